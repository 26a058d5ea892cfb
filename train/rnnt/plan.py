"""Where everything of one batch lies: rows of the logits, cells of the lattice, tasks of the threads.

Invariant: offsets are 64-bit, and the tasks depend on the lengths alone, never on the number of threads, so that
results are the same bits for any number. Run: pytest tests/train/rnnt/test_threads.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .checks import LossBatch

TASK_ELEMENTS = 1 << 18  # logits of one task, a megabyte: long beside taking a task, short beside a batch


@dataclass(frozen=True)
class LatticePlan:
    """first, per_frame int64 [B]: cell (t, u) of utterance b is row first[b] + t*per_frame[b] + u - band[b, t].

    band int64 [B, Tmax] is the first unit that has a row at a frame (0 unless pruned); frames int64 [B] is the room.
    at int64 [B+1], base int64 [sum of T+U]: it is number base[at[b] + t + u] + u of the lattice's arrays, where
    utterance b has those from cells[b] on.
    """

    first: np.ndarray
    per_frame: np.ndarray
    frames: np.ndarray
    band: np.ndarray
    pruned: bool
    at: np.ndarray
    cells: np.ndarray
    base: np.ndarray

    @property
    def total(self) -> int:
        return int(self.cells[-1])

    @property
    def longest(self) -> int:
        """The most cells of an utterance."""
        return int(np.diff(self.cells).max(initial=0))


def make_plan(batch: LossBatch, padded: tuple[int, int] | None, band: np.ndarray | None = None) -> LatticePlan:
    """padded: (Tmax, rows a frame) of the logits, None for packed rows. band [B, Tmax]: see Plan."""
    from .cpu.plan import lay_out

    first, per_frame, frames, at, cells, base = lay_out(batch.T, batch.U, *(padded or (0, 0)))
    pruned = band is not None
    if band is None:
        band = np.zeros((batch.T.size, int(frames.max(initial=0))), np.int64)
    return LatticePlan(first, per_frame, frames, band, pruned, at, cells, base)


def make_tasks(frames: np.ndarray, per_frame: np.ndarray, V: int) -> tuple[np.ndarray, np.ndarray]:
    """Tasks int64 [K, 3] (utterance, frames from, to) of about TASK_ELEMENTS logits; their number per utterance [B]."""
    from .cpu.plan import share_out

    return share_out(frames, per_frame, V, TASK_ELEMENTS)
