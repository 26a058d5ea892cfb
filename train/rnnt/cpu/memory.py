"""Tensors as the arrays that the kernels take, and memory for gradients that is used again.

The kernel clears every page when it is first written, which takes longer than the arithmetic: 0.5 ns a logit on huge
pages, 2 on ordinary ones, and gradients need 0.3. So the memory of a gradient waits for the next one.
Guarantees: nothing is copied here. A gradient keeps its memory while it, or any view of it, lives. The memory that
waits belongs to the operating system as soon as it needs it (MADV_FREE).
Try: `pytest tests/train/rnnt/test_memory.py`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref

import numpy as np
import torch

HUGE = 2 << 20
SMALLEST = 4 << 20  # bytes of a gradient whose memory is kept. malloc itself keeps what is smaller
SUPPORTED = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MAP_PRIVATE")

_waiting: list[mmap.mmap] = []  # one block at most
_lent: dict[int, _LentMemory] = {}  # The references must outlive their arrays.


class _LentMemory(weakref.ref):
    """A weak reference to the array under a gradient, with its memory."""

    __slots__ = ("block",)
    block: mmap.mmap


def _fresh(size: int) -> mmap.mmap:
    """Return memory for `size` bytes from a huge page's start on, and for gradients that are a little larger."""
    block = mmap.mmap(-1, size * 9 // 8 + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # Some kernels have no huge pages.
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _take(size: int) -> mmap.mmap:
    with contextlib.suppress(IndexError):
        block = _waiting.pop()
        if len(block) >= size + HUGE:
            return block
        del block  # so that both never exist at once
    return _fresh(size)


def _back(lent: _LentMemory) -> None:
    """Take memory back, in the thread that drops the last view. The largest block waits."""
    del _lent[id(lent)]
    block = lent.block
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_FREE)
        if not _waiting or len(_waiting[0]) < len(block):
            _waiting[:] = [block]


def release() -> None:
    """Return the memory that waits for a gradient to the operating system."""
    _waiting.clear()


os.register_at_fork(after_in_child=release)  # Shared pages would be copied when they are written.


def fresh_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return torch.empty_like, in memory of an earlier result if it is large."""
    size = tensor.numel() * tensor.element_size()
    if size < SMALLEST or not SUPPORTED:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    try:
        block = _take(size)
    except OSError:  # There is not as much. torch says so.
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    whole = np.frombuffer(block, np.uint8)
    first = -whole.ctypes.data % HUGE
    # Its base is not an array, so numpy and torch keep `own` itself for all views of it.
    own = np.frombuffer(block, np.uint8, size, first)
    lent = _LentMemory(own, _back)
    lent.block = block
    _lent[id(lent)] = lent
    return torch.frombuffer(own, dtype=tensor.dtype).view(tensor.shape)


def as_rows(tensor: torch.Tensor) -> np.ndarray:
    """Return a contiguous tensor [..., V] as a matrix [rows, V], half precision as the integers of its bits."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    bits = tensor.view(torch.int16) if tensor.element_size() == 2 else tensor
    rows = bits.numpy().reshape(-1, bits.shape[-1])  # torch's own view takes several times as long
    return rows.view(np.uint16) if tensor.dtype == torch.bfloat16 else rows
