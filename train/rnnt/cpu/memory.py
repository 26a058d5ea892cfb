"""Tensors as the arrays that the kernels take, and new memory on huge pages.

Guarantees: nothing is copied here.
Try: `pytest tests/train/rnnt/test_loss.py`.
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
except (AttributeError, OSError):  # Without this call there are ordinary pages, which fault in more slowly.
    _madvise = None


def _huge_free() -> int:
    """Return the bytes of free huge pages in the zone that the operating system takes from, 0 if they are unknown.

    If these run short, asking for them makes it move other memory, which takes longer than ordinary pages.
    """
    try:
        with open("/proc/buddyinfo") as file:
            zones = [line.split() for line in file]
    except OSError:
        return 0
    # After four words come the free blocks of 4 KiB << order. Order 9 is a huge page.
    return max((sum(int(n) * (_HUGE << k) for k, n in enumerate(zone[13:])) for zone in zones[2:]), default=0)


def fresh_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return torch.empty_like on huge pages: on ordinary ones, page faults cost more than computing the result."""
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    size = result.numel() * result.element_size()
    if _madvise is not None and size >= 2 * _HUGE and result.device.type == "cpu" and 2 * size <= _huge_free():
        begin = -(-result.data_ptr() // _HUGE) * _HUGE
        end = (result.data_ptr() + size) // _HUGE * _HUGE
        _madvise(begin, end - begin, _MADV_HUGEPAGE)
    return result


def as_rows(tensor: torch.Tensor) -> np.ndarray:
    """Return a contiguous tensor [..., V] as a matrix [rows, V], half precision as the integers of its bits."""
    rows = tensor.detach().view(-1, tensor.shape[-1])
    if tensor.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float16:
        return rows.view(torch.int16).numpy()
    return rows.numpy()
