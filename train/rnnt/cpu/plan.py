"""Where each part of a batch lies: rows of the logits, cells of the lattice, tasks of the threads.

The small integer work is compiled. In Python, with cold caches, it took a third of a millisecond, as much as a tenth
of a small batch.
Guarantees: offsets are 64-bit. The tasks depend on the lengths alone, never on the number of threads, so results are
the same bits for any number. What `sound` accepts cannot make a kernel leave its arrays.
Try: `pytest tests/train/rnnt/test_threads.py tests/train/rnnt/test_guards.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .lattice import CLOSED
from .numeric import kernel

TASK_ELEMENTS = 1 << 18  # logits of one task, a megabyte: long beside taking a task, short beside a batch


class LatticePlan(NamedTuple):
    """Where the rows and cells of a batch are.

    Cell (t, u) of utterance b is row first[b] + t*per_frame[b] + u - band[b, t] of the logits. In the lattice's arrays
    it is number base[at[b] + t + u] + u.
    """

    first: np.ndarray  # int64 [B]
    per_frame: np.ndarray  # int64 [B]
    band: np.ndarray  # int64 [B, Tmax]: the first unit that has a row at a frame, 0 unless pruned
    at: np.ndarray  # int64 [B+1]
    base: np.ndarray  # int64 [sum of T+U]
    tasks: np.ndarray  # of `share_out`: frames of the utterances
    left: np.ndarray  # int64 [B]: the number of each utterance's tasks
    padded_tasks: np.ndarray  # of `share_out`: frames that the logits have, padding included
    total: int  # cells
    longest: int  # the most cells of an utterance
    most_units: int
    pruned: bool

    def arrays(self, exact: bool) -> list[np.ndarray]:
        """Return arrays for lse, blank and label of each cell, float64 if `exact`. Arcs outside a band are closed."""
        lse, *arcs = (np.empty(self.total, np.float64 if exact else np.float32) for _ in range(3))
        if self.pruned:
            for arc in arcs:
                arc.fill(CLOSED)
        return [lse, *arcs]


def make_plan(
    T: np.ndarray, U: np.ndarray, padded: tuple[int, int] | None, band: np.ndarray | None = None, vocabulary: int = 1
) -> LatticePlan:
    """Return the plan of a batch. Its logits have `padded` = (Tmax, rows of a frame), or None if they are packed.

    A task has about TASK_ELEMENTS logits of a `vocabulary`.
    """
    frames, width = padded or (0, 0)
    fields: Any = lay_out(T, U, frames, width, vocabulary, TASK_ELEMENTS)
    plan = LatticePlan._make([*fields, band is not None])
    return plan if band is None else plan._replace(band=band)


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


@kernel
def lay_out(T, U, frames, width, V, elements):
    """Return the fields of a LatticePlan but the last, with a band of zeros. With width 0 rows are packed."""
    B = T.size
    first, per_frame, room = np.empty(B, np.int64), np.empty(B, np.int64), np.empty(B, np.int64)
    at = np.zeros(B + 1, np.int64)
    total, longest, most_units, most_frames = 0, 0, 0, 0
    for b in range(B):
        cells = T[b] * (U[b] + 1)
        at[b + 1] = at[b] + T[b] + U[b]
        first[b] = b * frames * width if width > 0 else total
        per_frame[b] = width if width > 0 else U[b] + 1
        room[b] = frames if width > 0 else T[b]
        total += cells
        longest, most_units = max(longest, cells), max(most_units, U[b])
        most_frames = max(most_frames, room[b])
    base, position = np.empty(at[B], np.int64), 0
    for b in range(B):
        for n in range(T[b] + U[b]):
            low, high = max(0, n - T[b] + 1), min(n, U[b])
            base[at[b] + n] = position - low
            position += high - low + 1
    tasks, left = share_out(T, U + 1, V, elements)
    padded_tasks, _ = share_out(room, per_frame, V, elements)
    band = np.zeros((B, most_frames), np.int64)
    return first, per_frame, band, at, base, tasks, left, padded_tasks, total, longest, most_units
