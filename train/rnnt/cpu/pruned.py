"""Kernels of the pruned loss: dense arcs to diagonals and back, and the choice of the band.

Guarantees: the result of best_band is the maximum over all bands that hold an alignment.
Try: `pytest tests/train/rnnt/test_pruned.py`.
"""

from __future__ import annotations

import numpy as np

from .lattice import CLOSED, closed_if_less
from .numeric import borrow, kernel


@kernel
def to_diagonals(dense, T, U, at, base, out):
    """Copy dense [B, Tmax, Umax+1] into the lattice's numbering. Scores below CLOSED become CLOSED."""
    for b in range(T.size):
        own = borrow(base)[at[b] : at[b + 1]]
        for t in range(T[b]):
            for u in range(U[b] + 1):
                out[own[t + u] + u] = closed_if_less(dense[b, t, u])


@kernel
def to_dense(cells, T, U, at, base, out):
    """Copy from the lattice's numbering into out [B, Tmax, Umax+1], which holds zeros."""
    for b in range(T.size):
        own = borrow(base)[at[b] : at[b + 1]]
        for t in range(T[b]):
            for u in range(U[b] + 1):
                out[b, t, u] = cells[own[t + u] + u]


@kernel
def best_band(gamma, width, band):
    """Write the first units of the band of `width` units with the greatest sum of gamma [T, U+1] to band [≥ T]."""
    T, U1 = gamma.shape
    starts = max(1, U1 - width + 1)
    size = min(width, U1)
    best, before = np.full(starts, CLOSED), np.full(starts, CLOSED)
    came = np.zeros((T, starts), np.int32)
    for t in range(T):
        score = 0.0
        for u in range(size):
            score += gamma[t, u]
        for s in range(starts):
            if s > 0:
                score += gamma[t, s + size - 1] - gamma[t, s - 1]
            if t == 0:
                best[s] = score if s == 0 else CLOSED
                continue
            at, high = s, before[s]
            for previous in range(max(0, s - width + 1), s):
                if before[previous] > high:
                    at, high = previous, before[previous]
            best[s] = high + score if high > CLOSED else CLOSED
            came[t, s] = at
        best, before = before, best
    s = starts - 1
    for t in range(T - 1, -1, -1):
        band[t] = s
        s = came[t, s]
