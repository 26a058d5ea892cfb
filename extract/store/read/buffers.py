"""Memory for batches that is used again, because new pages cost more than the copy that fills them.

The kernel clears every page when it is first written, and takes a batch's pages back when the batch is dropped. For 64
utterances in 24 layers of 1,024 (120 MB) that is two thirds of the time. So the next batch gets the memory.

Guarantees: an array keeps its memory while it, or any view or tensor of it, lives. At most `most` bytes wait for a
batch. There is no lock, so a fork cannot copy a held one.
Try: `pytest tests/extract/store/test_buffers.py`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from typing import Any

import numpy as np

SMALLEST = 1 << 17  # malloc asks the kernel only for what is larger
KEPT = 256 << 20
HUGE = 2 << 20
MOST_BLOCKS = 128  # `_take` looks at each


class _LentArray(weakref.ref):
    """A weak reference to an array that was handed out, with its memory."""

    __slots__ = ("memory",)
    memory: np.ndarray


class BufferPool:
    """`empty` is np.empty, whose memory comes back when its array and all views of it are gone."""

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self._free: list[np.ndarray] = []  # uint8 [n]; the one that has waited longest is first
        self._lent: dict[int, _LentArray] = {}  # The references must outlive their arrays.

    @property
    def kept(self) -> int:
        """Bytes that wait for a batch."""
        return sum(block.nbytes for block in list(self._free))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array with any content, C-contiguous."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        size = count * dtype.itemsize
        if not SMALLEST <= size <= self.most:
            return np.empty(shape, dtype)
        memory = self._take(size)
        # Its base is not an array, so numpy makes `whole` itself the base of all views of it.
        whole = np.frombuffer(memory.data, dtype, count)
        lent = _LentArray(whole, self._back)
        lent.memory = memory
        self._lent[id(lent)] = lent
        return whole.reshape(shape)

    def _take(self, size: int) -> np.ndarray:
        """Return uint8 [at least size]: the smallest block that fits and is not far too large."""
        fits = [(b.nbytes, -n) for n, b in enumerate(self._free) if size <= b.nbytes <= 2 * size]
        if fits:
            with contextlib.suppress(IndexError):
                block = self._free.pop(-min(fits)[1])
                if size <= block.nbytes <= 2 * size:  # Otherwise another thread has moved the blocks.
                    return block
                self._free.insert(0, block)
        return _fresh(size * 9 // 8)  # so that a next batch that is a little longer fits

    def _back(self, lent: _LentArray) -> None:
        """Take memory back. The thread that drops the last view calls this, possibly within `_take`."""
        self._lent.pop(id(lent), None)
        self._free.append(lent.memory)
        while self._free and (len(self._free) > MOST_BLOCKS or self.kept > self.most):
            with contextlib.suppress(IndexError):
                del self._free[0]

    def clear(self) -> None:
        """Return to the system what no array uses."""
        self._free = []


def _fresh(size: int) -> np.ndarray:
    """Return uint8 [at least size], in huge pages where they pay: filling small ones takes twice as long."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < HUGE // 2:
        return np.empty(size, np.uint8)
    size = -(-size // HUGE) * HUGE
    mapped = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(mapped, np.uint8)
    first = -whole.ctypes.data % HUGE
    with contextlib.suppress(OSError):  # Some kernels have none.
        mapped.madvise(advice, first, size)
    return whole[first : first + size]


BATCH_BUFFERS = BufferPool()  # for all stores of the process
os.register_at_fork(after_in_child=BATCH_BUFFERS.clear)  # Shared pages would be copied when they are written.
