"""Kernels of the token-and-duration transducer: its lattice along diagonals, and the duration head's rows.

Cells and token rows are those of lattice.py. An arc of duration d leads from diagonal n to n + d (blank, d > 0) or to
n + d + 1 (label), never to its own. So one diagonal can be computed at once here, too.
Guarantees: dur [D, cells] holds log-probabilities before the lattice, and occupancies after it.
Try: `pytest tests/train/rnnt/test_tdt.py`.
"""

from __future__ import annotations

import math

import numpy as np

from .lattice import CLOSED, IMPOSSIBLE, row_stage
from .numeric import borrow, exp32, fetch_add, kernel, log_add, log_add_exact
from .rows import computed, load, store

f32 = np.float32


@kernel
def add_arc(out, score, arc, duration, exact):
    """Set out to logadd(out, score + arc + duration), element by element."""
    if exact:
        for k in range(out.size):
            out[k] = log_add_exact(out[k], score[k] + arc[k] + duration[k])
    else:
        for k in range(out.size):
            out[k] = log_add(out[k], score[k] + arc[k] + duration[k])


@kernel
def tdt_alphas(T, U, base, blank_lp, label_lp, dur, durations, alpha, exact):
    for n in range(T + U):
        low, high = max(0, n - T + 1), min(n, U)
        alpha[base[n] + low : base[n] + high + 1] = CLOSED
        if n == 0:
            alpha[base[0]] = 0.0
        for i in range(durations.size):
            d = durations[i]
            m = n - d
            if d > 0 and m >= 0:  # blank arcs from (t-d, u)
                i0, i1 = max(low, m - T + 1), min(high, m) + 1
                if i0 < i1:
                    p0, p1 = base[m] + i0, base[m] + i1
                    out = alpha[base[n] + i0 : base[n] + i1]
                    add_arc(out, alpha[p0:p1], blank_lp[p0:p1], dur[i, p0:p1], exact)
            m -= 1
            if m >= 0:  # label arcs from (t-d, u-1)
                i0, i1 = max(low, max(0, m - T + 1) + 1), min(high, m + 1) + 1
                if i0 < i1:
                    p0, p1 = base[m] + i0 - 1, base[m] + i1 - 1
                    out = alpha[base[n] + i0 : base[n] + i1]
                    add_arc(out, alpha[p0:p1], label_lp[p0:p1], dur[i, p0:p1], exact)


@kernel
def tdt_total(T, U, base, blank_lp, dur, durations, alpha):
    """Return log P(y): blanks from (T-d, U) end an alignment."""
    total = CLOSED
    for i in range(durations.size):
        t = T - durations[i]
        if 0 <= t < T:
            cell = base[t + U] + U
            total = log_add_exact(total, alpha[cell] + blank_lp[cell] + dur[i, cell])
    return total


@kernel
def behind(n, d, T, U, low, high, base, beta, stay, move):
    """Copy the betas that arcs of duration d reach from diagonal n, by u - low: stay for blanks, move for labels."""
    stay[:] = CLOSED
    move[:] = CLOSED
    i0 = max(low, n + d - T + 1)  # from there on t + d < T
    if d > 0:
        for u in range(i0, high + 1):
            stay[u - low] = beta[base[n + d] + u]
        if n + d == T + U and low <= U <= high:
            stay[U - low] = 0.0  # t + d = T
    for u in range(i0, min(high, U - 1) + 1):
        move[u - low] = beta[base[n + d + 1] + u + 1]


@kernel
def tdt_betas(T, U, base, blank_lp, label_lp, dur, durations, alpha, beta, total, fastemit, exact):
    """Go backwards: blank_lp, label_lp and dur become occupancies. In dur, label arcs count 1 + fastemit times."""
    stay, move = np.empty(U + 1), np.empty(U + 1)
    sum_blank, sum_label = np.empty(U + 1), np.empty(U + 1)
    for n in range(T + U - 1, -1, -1):
        low, high = max(0, n - T + 1), min(n, U)
        p0, p1 = base[n] + low, base[n] + high + 1
        size = p1 - p0
        a, out, lb, ll = alpha[p0:p1], beta[p0:p1], blank_lp[p0:p1], label_lp[p0:p1]
        out[:] = CLOSED
        for i in range(durations.size):
            behind(n, durations[i], T, U, low, high, base, beta, stay, move)
            add_arc(out, stay[:size], lb, dur[i, p0:p1], exact)
            add_arc(out, move[:size], ll, dur[i, p0:p1], exact)
        sum_blank[:] = 0
        sum_label[:] = 0
        for i in range(durations.size):
            behind(n, durations[i], T, U, low, high, base, beta, stay, move)
            own = dur[i, p0:p1]
            for k in range(size):
                common = a[k] + own[k] - total
                if exact:
                    q, e = math.exp(common + lb[k] + stay[k]), math.exp(common + ll[k] + move[k])
                else:
                    q = np.float64(exp32(f32(common + lb[k] + stay[k])))
                    e = np.float64(exp32(f32(common + ll[k] + move[k])))
                sum_blank[k] += q
                sum_label[k] += e
                own[k] = q + (1 + fastemit) * e
        for k in range(size):
            lb[k] = sum_blank[k]
            ll[k] = sum_label[k]


@kernel
def tdt_lattice(T, U, base, blank_lp, label_lp, dur, durations, alpha, beta, fastemit, exact):
    tdt_alphas(T, U, base, blank_lp, label_lp, dur, durations, alpha, exact)
    total = tdt_total(T, U, base, blank_lp, dur, durations, alpha)
    if total < IMPOSSIBLE:
        for n in range(T + U):
            low, high = base[n] + max(0, n - T + 1), base[n] + min(n, U) + 1
            blank_lp[low:high] = 0
            label_lp[low:high] = 0
            dur[:, low:high] = 0
        return np.inf
    tdt_betas(T, U, base, blank_lp, label_lp, dur, durations, alpha, beta, total, fastemit, exact)
    return -total


@kernel
def duration_lse(row):
    high = load(row, 0)
    for i in range(1, row.size):
        value = load(row, i)
        high = value if not (value <= high) else high
    if not (-np.inf < high < np.inf):
        return np.nan
    total = 0.0
    for i in range(row.size):
        total += math.exp(np.float64(load(row, i)) - high)
    return high + math.log(total)


@kernel
def duration_stage(t0, t1, d_rows, U, first, per_frame, base, dur, sigma):
    """Write the durations' log-probabilities, minus sigma, of frames t0..t1 to dur [D, cells].

    Each arc has exactly one duration, so sigma counts once.
    """
    for t in range(t0, t1):
        for u in range(U + 1):
            row = d_rows[first + t * per_frame + u]
            cell = base[t + u] + u
            lse = duration_lse(row)
            for i in range(row.size):
                value = np.float64(load(row, i)) - lse
                dur[i, cell] = (CLOSED if value < CLOSED else value) - sigma


@kernel
def tdt_forward(
    thread, x, d_rows, y, T, U, first, per_frame, band, at, base, tasks, counter, left, lse, blank_lp, label_lp, dur,
    durations, alpha, beta, width, costs, blank, delay, sigma, fastemit, exact,
):  # fmt: skip
    """Run stages 1 and 2, as `forward` in lattice.py."""
    x, d_rows, y, base, tasks, band = borrow(x), borrow(d_rows), borrow(y), borrow(base), borrow(tasks), borrow(band)
    lse, blank_lp, label_lp, dur = borrow(lse), borrow(blank_lp), borrow(label_lp), borrow(dur)
    alpha, beta = borrow(alpha), borrow(beta)
    work, work64 = np.empty((2, width), lse.dtype), np.empty(width)
    while True:
        k = tasks.shape[0] - 1 - fetch_add(counter, 0, 1)
        if k < 0:
            return
        b = tasks[k, 0]
        own = base[at[b] : at[b + 1]]
        row_stage(
            tasks[k, 1], tasks[k, 2], x, y[b], T[b], U[b], first[b], per_frame[b], band[b], own, lse, blank_lp,
            label_lp, blank, delay, True, work, work64,
        )  # fmt: skip
        duration_stage(tasks[k, 1], tasks[k, 2], d_rows, U[b], first[b], per_frame[b], own, dur, sigma)
        if fetch_add(left, b, -1) == 1:
            costs[b] = tdt_lattice(T[b], U[b], own, blank_lp, label_lp, dur, durations, alpha, beta, fastemit, exact)


@kernel
def duration_backward(thread, d_rows, out, T, U, first, per_frame, at, base, counter, dur, scale):
    """Write the gradient of the duration logits to out, which holds zeros."""
    d_rows, out, base, dur = borrow(d_rows), borrow(out), borrow(base), borrow(dur)
    while True:
        b = fetch_add(counter, 0, 1)
        if b >= T.size:
            return
        own = base[at[b] : at[b + 1]]
        for t in range(T[b]):
            for u in range(U[b] + 1):
                source, target = d_rows[first[b] + t * per_frame[b] + u], out[first[b] + t * per_frame[b] + u]
                cell = own[t + u] + u
                gamma = 0.0
                for i in range(source.size):
                    gamma += dur[i, cell]
                if gamma == 0:
                    continue
                lse = duration_lse(source)
                for i in range(source.size):
                    p = math.exp(np.float64(load(source, i)) - lse)
                    store(target, i, computed(target, (p * gamma - dur[i, cell]) * scale[b]))
