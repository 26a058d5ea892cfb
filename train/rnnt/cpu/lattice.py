"""The three stages of the loss on the CPU, over any layout of the logits, each one kernel that threads run together.

1. rows: logsumexp, blank and label log-probability of each cell. Nothing else of the logits is kept.
2. lattice: alphas forwards, then betas and occupancies backwards, along anti-diagonals n = t + u. These are stored
   contiguously: cell (t, u) of utterance b is number base[at[b] + t + u] + u, one of T*(U+1).
3. gradient: each row from its own logits, logsumexp and two occupancies.

Rows are numbered by layout: cell (t, u) is row first[b] + t*per_frame[b] + u - band[b, t] of a matrix [rows, V].
Without pruning, band is 0. With it, only units band[b, t] … band[b, t] + per_frame[b] - 1 have rows at frame t.
Guarantees: a thread takes its next task from a counter, and no result depends on which thread computed it.
Try: `pytest tests/train/rnnt/test_loss.py`.
"""

from __future__ import annotations

import math

import numpy as np

from .numeric import borrow, clear_rows, exp32, fetch_add, kernel, log_add, log_add_exact
from .rows import gradient_row, load, log_sum_exps

f32 = np.float32
CLOSED = -1e30  # The score of an arc that cannot be taken. It is finite, so differences stay numbers.
IMPOSSIBLE = -1e29  # An utterance with a lower score has no alignment.


@kernel
def closed_if_less(x):
    return CLOSED if x < CLOSED else x  # NaN stays.


@kernel
def row_stage(
    t0, t1, x, y, T, U, first, per_frame, band, base, lse, blank_lp, label_lp, blank, delay, fused, work, work64
):  # fmt: skip
    """Run stage 1 for frames t0..t1 of one utterance, to which y, first, per_frame, band [T] and base belong.

    work [2, U+1 or more], of the type that is computed in, and work64 [U+1 or more] are memory to work in.
    """
    work[0] = 0
    work64[:] = 0
    for t in range(t0, t1):
        low = band[t]
        count = min(per_frame, U + 1 - low)
        reference, sums, out = work[0, :count], work[1, :count], work64[:count]
        row0 = first + t * per_frame
        rows = x[row0 : row0 + count]
        if fused:
            if t == t0:  # The first row of a task is the first guess for all rows of its frame.
                log_sum_exps(rows[:1], reference, sums, out)
                work[0] = reference[0]
            log_sum_exps(rows, reference, sums, out)  # around the results of the frame before
        bonus = delay * ((T - 1) * 0.5 - t)
        for i in range(count):
            u = low + i
            cell = base[t + u] + u
            lse[cell] = out[i]
            blank_lp[cell] = closed_if_less(load(rows[i], blank) - out[i])
            label_lp[cell] = closed_if_less(load(rows[i], y[u]) - out[i] + bonus) if u < U else CLOSED


@kernel
def alphas(T, U, base, blank_lp, label_lp, alpha, exact):
    """Compute the alphas of one utterance. alpha [T*(U+1) or more] begins with the utterance's first cell."""
    start = base[0]
    alpha[0] = 0.0
    for n in range(1, T + U):
        low, high = max(0, n - T + 1), min(n, U)
        here, before = base[n] - start, base[n - 1]
        old = before - start
        if low == 0:
            alpha[here] = alpha[old] + blank_lp[before]
        if high == n:
            alpha[here + n] = alpha[old + n - 1] + label_lp[before + n - 1]
        i, j = max(low, 1), min(high, n - 1) + 1
        out = alpha[here + i : here + j]
        up, up_lp = alpha[old + i : old + j], blank_lp[before + i : before + j]
        left, left_lp = alpha[old + i - 1 : old + j - 1], label_lp[before + i - 1 : before + j - 1]
        if exact:
            for k in range(out.size):
                out[k] = log_add_exact(up[k] + up_lp[k], left[k] + left_lp[k])
        else:
            for k in range(out.size):
                out[k] = log_add(up[k] + up_lp[k], left[k] + left_lp[k])


@kernel
def betas(T, U, base, blank_lp, label_lp, alpha, total, scratch, exact):
    """Go backwards through the lattice: blank_lp and label_lp become the occupancies of their arcs.

    scratch [2, U+3] holds two diagonals of betas, unit u at u+1, with a closed cell on both sides.
    """
    nxt, cur = scratch[0], scratch[1]
    nxt[:] = CLOSED
    cur[:] = CLOSED
    nxt[U + 1] = 0.0  # behind the last blank, which only the blank arc of (T-1, U) reaches
    for n in range(T + U - 1, -1, -1):
        low, high = max(0, n - T + 1), min(n, U)
        here = base[n]
        size = high - low + 1
        a = alpha[here - base[0] + low : here - base[0] + high + 1]
        lb, ll = blank_lp[here + low : here + high + 1], label_lp[here + low : here + high + 1]
        stay, move = nxt[low + 1 : high + 2], nxt[low + 2 : high + 3]
        out = cur[low + 1 : high + 2]
        if exact:
            for k in range(size):
                out[k] = log_add_exact(lb[k] + stay[k], ll[k] + move[k])
            for k in range(size):
                lb[k] = math.exp(a[k] + lb[k] + stay[k] - total)
            for k in range(size):
                ll[k] = math.exp(a[k] + ll[k] + move[k] - total)
        else:  # Three loops, because the compiler does not vectorise one with six arrays that might overlap.
            for k in range(size):
                out[k] = log_add(lb[k] + stay[k], ll[k] + move[k])
            for k in range(size):
                lb[k] = exp32(f32(a[k] + lb[k] + stay[k] - total))
            for k in range(size):
                ll[k] = exp32(f32(a[k] + ll[k] + move[k] - total))
        cur[low] = CLOSED
        cur[high + 2] = CLOSED
        nxt, cur = cur, nxt


@kernel
def lattice_stage(T, U, base, blank_lp, label_lp, alpha, exact):
    """Run stage 2 of one utterance and return its cost. blank_lp and label_lp become occupancies.

    Without an alignment the cost is infinite and the occupancies are 0.
    """
    alphas(T, U, base, blank_lp, label_lp, alpha, exact)
    last = base[T + U - 1] + U
    total = np.float64(alpha[last - base[0]]) + np.float64(blank_lp[last])
    if total < IMPOSSIBLE:
        for n in range(T + U):
            low, high = max(0, n - T + 1), min(n, U)
            blank_lp[base[n] + low : base[n] + high + 1] = 0
            label_lp[base[n] + low : base[n] + high + 1] = 0
        return np.inf
    betas(T, U, base, blank_lp, label_lp, alpha, total, np.empty((2, U + 3)), exact)
    return -total


@kernel
def forward(
    thread, x, y, T, U, first, per_frame, band, at, base, tasks, counter, left, lse, blank_lp, label_lp, longest,
    width, costs, blank, delay, fused, exact,
):  # fmt: skip
    """Run stages 1 and 2. tasks int64 [K, 3]: utterance, frames from, to.

    counter int64 [1] begins at 0, and left int64 [B] at each utterance's number of tasks. The thread that ends an
    utterance's rows computes its lattice. The last task is first: the end of the logits, just written, is still in a
    cache, and the backward pass will then find their beginning there.

    longest is the most cells of an utterance, and width Umax+1 or more.
    """
    x, y, base, tasks, band = borrow(x), borrow(y), borrow(base), borrow(tasks), borrow(band)
    lse, blank_lp, label_lp = borrow(lse), borrow(blank_lp), borrow(label_lp)
    alpha, work, work64 = np.empty(longest), np.empty((2, width), lse.dtype), np.empty(width)
    while True:
        k = tasks.shape[0] - 1 - fetch_add(counter, 0, 1)
        if k < 0:
            return
        b = tasks[k, 0]
        own = base[at[b] : at[b + 1]]
        row_stage(
            tasks[k, 1], tasks[k, 2], x, y[b], T[b], U[b], first[b], per_frame[b], band[b], own, lse, blank_lp,
            label_lp, blank, delay, fused, work, work64,
        )  # fmt: skip
        if fetch_add(left, b, -1) == 1:
            costs[b] = lattice_stage(T[b], U[b], own, blank_lp, label_lp, alpha, exact)


@kernel
def backward(
    thread, x, out, inplace, y, T, U, first, per_frame, band, at, base, tasks, counter, lse, occ_blank, occ_label,
    scale, blank, clamp, fused, fastemit, eps,
):  # fmt: skip
    """Run stage 3. tasks as in forward, but they cover the padding, too, which is set to 0. scale float64 [B]."""
    x, out, y, base, tasks = borrow(x), borrow(out), borrow(y), borrow(base), borrow(tasks)
    band = borrow(band)
    lse, occ_blank, occ_label = borrow(lse), borrow(occ_blank), borrow(occ_label)
    result = x if inplace else out
    while True:
        k = fetch_add(counter, 0, 1)
        if k >= tasks.shape[0]:
            return
        b = tasks[k, 0]
        own = base[at[b] : at[b + 1]]
        for t in range(tasks[k, 1], tasks[k, 2]):
            row0 = first[b] + t * per_frame[b]
            used = 0
            if t < T[b]:
                low = band[b, t]
                used = min(per_frame[b], U[b] + 1 - low)
                for i in range(used):
                    u = low + i
                    cell = own[t + u] + u
                    q, e = np.float64(occ_blank[cell]), np.float64(occ_label[cell]) * (1 + fastemit)
                    if q + e <= eps:
                        clear_rows(result, row0 + i, row0 + i + 1)
                        continue
                    label = y[b, u] if u < U[b] else -1
                    row = row0 + i
                    gradient_row(x, row, result, row, lse[cell], q, e, blank, label, scale[b], clamp, fused)
            clear_rows(result, row0 + used, row0 + per_frame[b])


@kernel
def lattices(thread, T, U, at, base, counter, blank_lp, label_lp, alpha, costs, exact):
    """Run stage 2 of all utterances, with alpha as in forward."""
    base, blank_lp, label_lp, own_alpha = borrow(base), borrow(blank_lp), borrow(label_lp), borrow(alpha)[thread]
    while True:
        b = fetch_add(counter, 0, 1)
        if b >= T.size:
            return
        costs[b] = lattice_stage(T[b], U[b], base[at[b] : at[b + 1]], blank_lp, label_lp, own_alpha, exact)


@kernel
def unpack_occupancy(T, U, at, base, occ_label, out):
    """Copy occ_label from diagonals into out [B, Umax, Tmax], which holds zeros."""
    for b in range(T.size):
        own = base[at[b] : at[b + 1]]
        for u in range(U[b]):
            for t in range(T[b]):
                out[b, u, t] = occ_label[own[t + u] + u]
