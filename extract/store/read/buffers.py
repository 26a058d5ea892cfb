"""Memory for batches, used again: fresh pages cost more than the copy that fills them.

The kernel clears every page when it is first written, and takes a batch's pages back as soon as the batch is dropped:
of 64 utterances in 24 layers of 1,024 (120 MB) that is two thirds of the time. So memory whose arrays are all gone
goes into the next batch.

Invariant: what is handed out belongs to its holder for as long as that array or any view of it lives (a view's `base`
keeps it; torch.from_numpy does, too); nothing is kept beyond `most` bytes; no lock, so a fork cannot copy a held one.
Run: `pytest tests/extract/store/test_buffers.py`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from typing import Any

import numpy as np

SMALLEST = 1 << 17  # malloc asks the kernel for what is larger, and keeps the rest itself
KEPT = 256 << 20
HUGE = 2 << 20
MOST_BLOCKS = 128  # `_take` looks at each


class _LentArray(weakref.ref):
    """A weak reference to an array that was handed out, with its memory."""

    __slots__ = ("memory",)
    memory: np.ndarray


class BufferPool:
    """`empty` is np.empty whose memory comes back when its array, and all views of it, are gone."""

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self._free: list[np.ndarray] = []  # uint8 [n], the longest unused first
        self._lent: dict[int, _LentArray] = {}  # the references have to outlive their arrays

    @property
    def kept(self) -> int:
        """Bytes that wait for a batch."""
        return sum(block.nbytes for block in list(self._free))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array with any content, C-contiguous."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        size = count * dtype.itemsize
        if not SMALLEST <= size <= self.most:
            return np.empty(shape, dtype)
        memory = self._take(size)
        # Its base is no array, so numpy leaves `whole` itself as the base of all views of it
        whole = np.frombuffer(memory.data, dtype, count)
        lent = _LentArray(whole, self._back)
        lent.memory = memory
        self._lent[id(lent)] = lent
        return whole.reshape(shape)

    def _take(self, size: int) -> np.ndarray:
        """uint8 [at least size]: the smallest that fits and is not far too large, of those the last one used."""
        fits = [(b.nbytes, -n) for n, b in enumerate(self._free) if size <= b.nbytes <= 2 * size]
        if fits:
            with contextlib.suppress(IndexError):
                block = self._free.pop(-min(fits)[1])
                if size <= block.nbytes <= 2 * size:  # else another thread has moved them
                    return block
                self._free.insert(0, block)
        return _fresh(size * 9 // 8)  # room for a next batch that is a little longer

    def _back(self, lent: _LentArray) -> None:
        """Called by whoever drops the last view, in any thread, also from within `_take`."""
        self._lent.pop(id(lent), None)
        self._free.append(lent.memory)
        while self._free and (len(self._free) > MOST_BLOCKS or self.kept > self.most):
            with contextlib.suppress(IndexError):
                del self._free[0]

    def clear(self) -> None:
        """Give back to the system what no array uses."""
        self._free = []


def _fresh(size: int) -> np.ndarray:
    """uint8 [at least size], in huge pages where they are worth it: filling small ones takes twice as long, again and
    again, since the processor remembers the places of few.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < HUGE // 2:
        return np.empty(size, np.uint8)
    size = -(-size // HUGE) * HUGE
    # Of this process alone: a fork has a copy of its own
    mapped = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(mapped, np.uint8)
    first = -whole.ctypes.data % HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        mapped.madvise(advice, first, size)
    return whole[first : first + size]


BATCH_BUFFERS = BufferPool()  # of the whole process, whatever stores it has open
os.register_at_fork(after_in_child=BATCH_BUFFERS.clear)  # two processes that write to one page both pay for it
