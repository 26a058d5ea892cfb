"""Kernels of the fused joint: hidden rows of a tile, what is kept of its logits, the gradients back.

A tile is a list of cells (t, u) of one utterance. A matrix product outside of this file makes logits [R, V] of its
hidden rows [R, H].
Guarantees: a cell's row of a tile depends on that cell alone.
Try: `pytest tests/train/rnnt/test_joint.py`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from .lattice import CLOSED, closed_if_less
from .numeric import borrow, kernel
from .rows import gradient_row, log_sum_exps
from .vector import combine_tanh


def tanh_row(encoder, t, predictor, u, hidden, r, multiply):
    """Set row r of hidden to tanh(encoder[t] + predictor[u]), or of the product. Absolute error 2e-7 for float32."""
    hidden[r] = np.tanh(encoder[t] * predictor[u] if multiply else encoder[t] + predictor[u])


@overload(tanh_row, inline="never")
def _tanh_row(encoder, t, predictor, u, hidden, r, multiply):
    if hidden.dtype == types.float32:
        return lambda encoder, t, predictor, u, hidden, r, multiply: combine_tanh(
            encoder, t, predictor, u, hidden, r, multiply
        )

    def impl(encoder, t, predictor, u, hidden, r, multiply):
        e, p, h = encoder[t], predictor[u], hidden[r]
        for i in range(h.size):
            h[i] = math.tanh(e[i] * p[i] if multiply else e[i] + p[i])

    return impl


@kernel
def band_cells(start, stop, U, width, band, cells):
    """Write cells number start..stop, counted by frames of `width` units each, to cells [R, 2] (t, u).

    Return how many there are. Numbers whose unit is behind U are left out.
    """
    count = 0
    for number in range(start, stop):
        t = number // width
        u = number - t * width + band[t]
        if u <= U:
            cells[count, 0], cells[count, 1] = t, u
            count += 1
    return count


@kernel
def active_cells(t0, t1, U, base, occ_blank, occ_label, eps, fastemit, cells):
    """Write the cells of frames t0..t1 whose occupancy exceeds eps, or is NaN, to cells [R, 2] (t, u), by frames.

    Return how many there are.
    """
    count = 0
    for t in range(t0, t1):
        for u in range(U + 1):
            cell = base[t + u] + u
            if not occ_blank[cell] + (1 + fastemit) * occ_label[cell] <= eps:
                cells[count, 0], cells[count, 1] = t, u
                count += 1
    return count


@kernel
def count_active(T, U, at, base, occ_blank, occ_label, eps, fastemit, counts):
    """Write how many cells of each frame active_cells will list to counts [sum of T]."""
    position = 0
    for b in range(T.size):
        own = borrow(base)[at[b] : at[b + 1]]
        for t in range(T[b]):
            count = 0
            for u in range(U[b] + 1):
                cell = own[t + u] + u
                count += not occ_blank[cell] + (1 + fastemit) * occ_label[cell] <= eps
            counts[position] = count
            position += 1


@kernel
def hidden_rows(encoder, predictor, cells, relu, multiply, hidden):
    """Set hidden [R, H] to activation(encoder[t] + predictor[u]), or of the product."""
    encoder, predictor, hidden = borrow(encoder), borrow(predictor), borrow(hidden)
    for r in range(cells.shape[0]):
        t, u = cells[r, 0], cells[r, 1]
        if relu:
            e, p, h = encoder[t], predictor[u], hidden[r]
            for i in range(h.size):
                value = e[i] * p[i] if multiply else e[i] + p[i]
                h[i] = value if not value < 0 else value * 0  # NaN stays.
        else:
            tanh_row(encoder, t, predictor, u, hidden, r, multiply)


@kernel
def keep_rows(logits, cells, y, T, U, base, lse, blank_lp, label_lp, blank, delay, work, work64):
    """Run stage 1 of a tile: write logsumexp, blank and label log-probability of its rows to their cells."""
    logits, base, lse = borrow(logits), borrow(base), borrow(lse)
    blank_lp, label_lp = borrow(blank_lp), borrow(label_lp)
    count = cells.shape[0]
    reference, sums, out = borrow(work)[0, :count], borrow(work)[1, :count], borrow(work64)[:count]
    reference[0] = 0
    log_sum_exps(logits[:1], reference, sums, out)
    reference[:] = reference[0]
    log_sum_exps(logits[:count], reference, sums, out)
    for r in range(count):
        t, u = cells[r, 0], cells[r, 1]
        cell = base[t + u] + u
        lse[cell] = out[r]
        blank_lp[cell] = closed_if_less(logits[r, blank] - out[r])
        bonus = delay * ((T - 1) * 0.5 - t)
        label_lp[cell] = closed_if_less(logits[r, y[u]] - out[r] + bonus) if u < U else CLOSED


@kernel
def gradient_rows(logits, cells, y, U, base, lse, occ_blank, occ_label, blank, scale, clamp, fastemit, bias):
    """Run stage 3 of a tile, in place of its logits, and add the rows to bias [V]."""
    logits, base, lse, bias = borrow(logits), borrow(base), borrow(lse), borrow(bias)
    for r in range(cells.shape[0]):
        t, u = cells[r, 0], cells[r, 1]
        cell = base[t + u] + u
        q, e = np.float64(occ_blank[cell]), np.float64(occ_label[cell]) * (1 + fastemit)
        row = logits[r]
        gradient_row(logits, r, logits, r, lse[cell], q, e, blank, y[u] if u < U else -1, scale, clamp, True)
        for v in range(bias.size):
            bias[v] += row[v]


@kernel
def scatter_rows(grad_hidden, hidden, encoder, predictor, cells, relu, multiply, grad_encoder, grad_predictor):
    """Go back through activation and sum (or product): add to grad_encoder [T, H] and grad_predictor [U+1, H]."""
    grad_hidden, hidden = borrow(grad_hidden), borrow(hidden)
    encoder, predictor = borrow(encoder), borrow(predictor)
    grad_encoder, grad_predictor = borrow(grad_encoder), borrow(grad_predictor)
    for r in range(cells.shape[0]):
        t, u = cells[r, 0], cells[r, 1]
        g, h = grad_hidden[r], hidden[r]
        ge, gp = grad_encoder[t], grad_predictor[u]
        if relu:
            for i in range(g.size):
                g[i] = g[i] if h[i] > 0 else h[i] * 0
        else:
            for i in range(g.size):
                g[i] *= 1 - h[i] * h[i]
        if multiply:
            e, p = encoder[t], predictor[u]
            for i in range(g.size):
                ge[i] += g[i] * p[i]
            for i in range(g.size):
                gp[i] += g[i] * e[i]
        else:
            for i in range(g.size):
                ge[i] += g[i]
            for i in range(g.size):
                gp[i] += g[i]
