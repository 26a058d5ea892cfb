"""Where each part of a batch lies: rows of the logits, cells of the lattice, tasks of the threads.

The small integer work is compiled. In Python, with cold caches, it took a third of a millisecond, as much as a tenth
of a small batch.
Guarantees: offsets are 64-bit. The tasks depend on the lengths alone, never on the number of threads, so results are
the same bits for any number. What `sound` accepts cannot make a kernel leave its arrays.
Try: `pytest tests/train/rnnt/test_threads.py tests/train/rnnt/test_guards.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .lattice import CLOSED
from .numeric import kernel

TASK_ELEMENTS = 1 << 18  # logits of one task, a megabyte: long beside taking a task, short beside a batch


@dataclass(frozen=True)
class LatticePlan:
    """Where the rows and cells of a batch are.

    Cell (t, u) of utterance b is row first[b] + t*per_frame[b] + u - band[b, t] of the logits. In the lattice's arrays
    it is number base[at[b] + t + u] + u, and the utterance's cells begin at cells[b].
    """

    first: np.ndarray  # int64 [B]
    per_frame: np.ndarray  # int64 [B]
    frames: np.ndarray  # int64 [B]: frames that the logits have, padding included
    band: np.ndarray  # int64 [B, Tmax]: the first unit that has a row at a frame, 0 unless pruned
    pruned: bool
    at: np.ndarray  # int64 [B+1]
    cells: np.ndarray  # int64 [B+1]
    base: np.ndarray  # int64 [sum of T+U]

    @property
    def total(self) -> int:
        return int(self.cells[-1])

    @property
    def longest(self) -> int:
        """The most cells of an utterance."""
        return int(np.diff(self.cells).max(initial=0))

    def arrays(self, exact: bool) -> list[np.ndarray]:
        """Return arrays for lse, blank and label of each cell, float64 if `exact`. Arcs outside a band are closed."""
        lse, *arcs = (np.empty(self.total, np.float64 if exact else np.float32) for _ in range(3))
        if self.pruned:
            for arc in arcs:
                arc.fill(CLOSED)
        return [lse, *arcs]


def make_plan(
    T: np.ndarray, U: np.ndarray, padded: tuple[int, int] | None, band: np.ndarray | None = None
) -> LatticePlan:
    """Return the plan of a batch. Its logits have `padded` = (Tmax, rows of a frame), or None if they are packed."""
    first, per_frame, frames, at, cells, base = lay_out(T, U, *(padded or (0, 0)))
    pruned = band is not None
    if band is None:
        band = np.zeros((T.size, int(frames.max(initial=0))), np.int64)
    return LatticePlan(first, per_frame, frames, band, pruned, at, cells, base)


def make_tasks(frames: np.ndarray, per_frame: np.ndarray, V: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `share_out`'s tasks of about TASK_ELEMENTS logits, and their number per utterance."""
    return share_out(frames, per_frame, V, TASK_ELEMENTS)


@kernel
def sound(y, T, U, blank, vocabulary, room_t, room_u, clean):
    """Return whether lengths and targets are inside. clean [B, Umax] becomes y with 0 behind each utterance's units."""
    good = True
    for b in range(T.size):
        if T[b] < 1 or T[b] > room_t or U[b] < 0 or U[b] > room_u:
            return False
        for u in range(y.shape[1]):
            unit = y[b, u] if u < U[b] else 0
            good &= u >= U[b] or (0 <= unit < vocabulary and unit != blank)
            clean[b, u] = unit
    return good


@kernel
def lay_out(T, U, frames, width):
    """Return first, per_frame, frames, at, cells and base of a LatticePlan. With width 0 rows are packed."""
    B = T.size
    first, per_frame, room = np.empty(B, np.int64), np.empty(B, np.int64), np.empty(B, np.int64)
    at, cells = np.zeros(B + 1, np.int64), np.zeros(B + 1, np.int64)
    for b in range(B):
        at[b + 1] = at[b] + T[b] + U[b]
        cells[b + 1] = cells[b] + T[b] * (U[b] + 1)
        first[b] = b * frames * width if width > 0 else cells[b]
        per_frame[b] = width if width > 0 else U[b] + 1
        room[b] = frames if width > 0 else T[b]
    base = np.empty(at[B], np.int64)
    for b in range(B):
        position = cells[b]
        for n in range(T[b] + U[b]):
            low, high = max(0, n - T[b] + 1), min(n, U[b])
            base[at[b] + n] = position - low
            position += high - low + 1
    return first, per_frame, room, at, cells, base


@kernel
def share_out(frames, per_frame, V, elements):
    """Return tasks int64 [K, 3] (utterance, frames from, to) of about `elements` logits, and the number of each [B]."""
    counts = np.empty(frames.size, np.int64)
    for b in range(frames.size):
        step = max(1, elements // max(1, per_frame[b] * V))
        counts[b] = -(-frames[b] // step)
    tasks, k = np.empty((counts.sum(), 3), np.int64), 0
    for b in range(frames.size):
        step = max(1, elements // max(1, per_frame[b] * V))
        for i in range(counts[b]):
            tasks[k, 0], tasks[k, 1], tasks[k, 2] = b, i * step, min((i + 1) * step, frames[b])
            k += 1
    return tasks, counts
