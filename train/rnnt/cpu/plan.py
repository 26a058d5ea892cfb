"""The small integer work before and between the stages, compiled: in Python, with cold caches, it took a third of a
millisecond, as much as a tenth of a small batch.

Invariant: what `sound` lets through can't make a kernel leave its arrays. Run: pytest tests/train/rnnt/test_guards.py
"""

from __future__ import annotations

import numpy as np

from .numeric import kernel


@kernel
def sound(y, T, U, blank, vocabulary, room_t, room_u, clean):
    """Whether lengths and targets are inside; clean [B, Umax] becomes y with 0 behind every utterance's units."""
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
    """first, per_frame, frames [B], at [B+1], cells [B+1], base of a Plan; width 0: packed rows, frames are T."""
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
    """Tasks int64 [K, 3] (utterance, frames from, to) of about `elements` logits; their number per utterance [B]."""
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
