"""Tensors as arrays that the kernels take, and fresh memory on huge pages.

Invariant: no copy is made here. Run: pytest tests/train/rnnt/test_loss.py
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

_HUGE = 2 << 20
_MADV_HUGEPAGE = 14
try:
    _madvise: Any = ctypes.CDLL(None, use_errno=True).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
except (AttributeError, OSError):  # no such call here: ordinary pages, slower to fault in
    _madvise = None


def _huge_free() -> int:
    """Bytes that the kernel has in free huge pages, in the zone that it takes from; 0 where it doesn't say.

    Asking when they run short makes it move other memory about, for longer than ordinary pages take.
    """
    try:
        with open("/proc/buddyinfo") as file:
            zones = [line.split() for line in file]
    except OSError:
        return 0
    # after four words come the free blocks of 4 KiB << order; order 9 is a huge page
    return max((sum(int(n) * (_HUGE << k) for k, n in enumerate(zone[13:])) for zone in zones[2:]), default=0)


def fresh_like(tensor: torch.Tensor) -> torch.Tensor:
    """torch.empty_like, asking for huge pages: faulting in a fresh result otherwise costs more than computing it."""
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    size = result.numel() * result.element_size()
    if _madvise is not None and size >= 2 * _HUGE and result.device.type == "cpu" and 2 * size <= _huge_free():
        begin = -(-result.data_ptr() // _HUGE) * _HUGE
        end = (result.data_ptr() + size) // _HUGE * _HUGE
        _madvise(begin, end - begin, _MADV_HUGEPAGE)
    return result


def as_rows(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor [..., V] as a matrix [rows, V]; half precision as the integers of its bits."""
    rows = tensor.detach().view(-1, tensor.shape[-1])
    if tensor.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float16:
        return rows.view(torch.int16).numpy()
    return rows.numpy()
