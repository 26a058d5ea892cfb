"""The three stages of the loss as CUDA kernels: one block computes an utterance's lattice, many blocks its rows.

They have no warp shuffles, because the simulator has none. Offsets are 64-bit. Threads stride over what is longer than
a block. cells.py holds what all kernels share, tdt.py those of the token-and-duration transducer.
No GPU has run these kernels yet.
Try: `pytest tests/train/rnnt/test_cuda.py`.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import numpy as np
from numba import float64

from .cells import CLOSED, IMPOSSIBLE, Arithmetic, cell_of, cuda
from .tdt import tdt_kernels

THREADS = 256  # the most threads of a block that the shared arrays below have elements for


@cache
def kernels(kind: str) -> SimpleNamespace:
    """Return the kernels for logits of a kind, such as "float32" (see `Arithmetic`)."""
    a = Arithmetic(kind)
    real, number, narrow, load, put, log_add = a.real, a.number, a.narrow, a.load, a.put, a.log_add

    @cuda.jit
    def rows(
        x, y, T, U, first, per_frame, band, cells, b0, t0, t1, lse, blank_lp, label_lp, blank, delay, fused
    ):  # fmt: skip
        """Run stage 1. Grid (utterances from b0, any), block (lanes of a row: a power of two, rows at once).

        Frames are t0..min(t1, T). Cell (t, u) is row first[b] + t*per_frame[b] + u - band[b, t].
        """
        highs = cuda.shared.array(THREADS, real)
        sums = cuda.shared.array(THREADS, real)
        lane, lanes, slot = cuda.threadIdx.x, cuda.blockDim.x, cuda.threadIdx.y
        me = slot * lanes + lane
        b = b0 + cuda.blockIdx.x
        Tb, Ub, V = T[b], U[b], x.shape[1]
        width = per_frame[b] if per_frame[b] < Ub + 1 else Ub + 1
        stop = (t1 if t1 < Tb else Tb) * width
        begin = t0 * width + cuda.blockIdx.y * cuda.blockDim.y
        for start in range(begin, stop, cuda.gridDim.y * cuda.blockDim.y):
            i = start + slot
            t = i // width
            inside = i < stop
            u = i - t * width
            row = np.int64(0)
            if inside:
                row = first[b] + t * per_frame[b] + u
                u += band[b, t]
                inside = u <= Ub
            high = number(-math.inf)
            total = number(0)
            if inside and fused:
                for v in range(lane, V, lanes):
                    value = number(load(x, row, v))
                    if value == -math.inf:
                        continue
                    if value <= high:
                        total += math.exp(value - high)
                    else:  # larger, or NaN
                        total = total * math.exp(high - value) + number(1)
                        high = value
            highs[me] = high
            sums[me] = total
            step = lanes // 2
            while step > 0:
                cuda.syncthreads()
                if lane < step:
                    a, c = highs[me], highs[me + step]
                    top = c if not (c <= a) else a  # NaN wins
                    if a != a:
                        top = a
                    if top != number(-math.inf):
                        sums[me] = sums[me] * math.exp(a - top) + sums[me + step] * math.exp(c - top)
                        highs[me] = top
                step //= 2
            cuda.syncthreads()
            if inside and lane == 0:
                result = number(0)
                if fused:
                    result = highs[me] + math.log(sums[me])
                    if highs[me] == math.inf:
                        result = number(math.nan)
                cell = cells[b] + cell_of(t, u, Tb, Ub)
                stay = number(load(x, row, blank)) - result
                move = number(CLOSED)
                if u < Ub:
                    bonus = delay * ((Tb - 1) * 0.5 - t)
                    move = number(load(x, row, y[b, u]) - result + bonus)
                lse[cell] = result
                blank_lp[cell] = number(CLOSED) if stay < number(CLOSED) else stay
                label_lp[cell] = number(CLOSED) if move < number(CLOSED) else move
            cuda.syncthreads()

    @cuda.jit
    def wavefront(T, U, cells, blank_lp, label_lp, alpha, beta):
        """Run stage 2. Grid (B, 2): alphas in blocks y = 0, betas in blocks y = 1. Any number of threads."""
        b = cuda.blockIdx.x
        Tb, Ub, base = T[b], U[b], cells[b]
        me, threads = cuda.threadIdx.x, cuda.blockDim.x
        if cuda.blockIdx.y == 0:
            for n in range(Tb + Ub):
                low = n - Tb + 1 if n >= Tb else 0
                high = n if n < Ub else Ub
                for u in range(low + me, high + 1, threads):
                    value = 0.0 if n == 0 else CLOSED
                    if u < n:  # t > 0
                        c = base + cell_of(n - u - 1, u, Tb, Ub)
                        value = alpha[c] + blank_lp[c]
                    if u > 0:
                        c = base + cell_of(n - u, u - 1, Tb, Ub)
                        move = alpha[c] + label_lp[c]
                        value = log_add(value, move) if u < n else move
                    alpha[base + cell_of(n - u, u, Tb, Ub)] = value
                cuda.syncthreads()
        else:
            for n in range(Tb + Ub - 1, -1, -1):
                low = n - Tb + 1 if n >= Tb else 0
                high = n if n < Ub else Ub
                for u in range(low + me, high + 1, threads):
                    t = n - u
                    c = base + cell_of(t, u, Tb, Ub)
                    stay = CLOSED
                    if t + 1 < Tb:
                        stay = blank_lp[c] + beta[base + cell_of(t + 1, u, Tb, Ub)]
                    elif u == Ub:
                        stay = float64(blank_lp[c])
                    move = CLOSED
                    if u < Ub:
                        move = label_lp[c] + beta[base + cell_of(t, u + 1, Tb, Ub)]
                    beta[c] = log_add(stay, move)
                cuda.syncthreads()

    @cuda.jit
    def occupancies(T, U, cells, blank_lp, label_lp, alpha, beta, costs):
        """Turn blank_lp and label_lp into occupancies, and set costs [B]. Grid (B, any), any number of threads."""
        b = cuda.blockIdx.x
        Tb, Ub, base = T[b], U[b], cells[b]
        total = beta[base]
        possible = not (total < IMPOSSIBLE)
        first = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if first == 0:
            costs[b] = -total if possible else math.inf
        for i in range(first, Tb * (Ub + 1), cuda.gridDim.y * cuda.blockDim.x):
            t = i // (Ub + 1)
            u = i - t * (Ub + 1)
            c = base + cell_of(t, u, Tb, Ub)
            stay = CLOSED
            if t + 1 < Tb:
                stay = beta[base + cell_of(t + 1, u, Tb, Ub)]
            elif u == Ub:
                stay = 0.0
            move = CLOSED
            if u < Ub:
                move = beta[base + cell_of(t, u + 1, Tb, Ub)]
            rest = alpha[c] - total
            blank_lp[c] = math.exp(number(rest + blank_lp[c] + stay)) if possible else number(0)
            label_lp[c] = math.exp(number(rest + label_lp[c] + move)) if possible else number(0)

    @cuda.jit
    def gradient(
        x, out, y, T, U, first, per_frame, band, cells, b0, t0, t1, lse, occ_blank, occ_label, scale, blank, clamp,
        fused, fastemit, eps,
    ):  # fmt: skip
        """Run stage 3 for frames t0..t1 of the layout, padding included. out may be x. Grid and block as in rows.

        With t1 < 0, frames go to the utterance's end.
        """
        lane, lanes, slot = cuda.threadIdx.x, cuda.blockDim.x, cuda.threadIdx.y
        b = b0 + cuda.blockIdx.x
        Tb, Ub, V, width = T[b], U[b], x.shape[1], per_frame[b]
        begin = t0 * width + cuda.blockIdx.y * cuda.blockDim.y + slot
        last = (Tb if t1 < 0 else t1) * width
        for i in range(begin, last, cuda.gridDim.y * cuda.blockDim.y):
            t = i // width
            u = i - t * width
            row = first[b] + t * width + u
            inside = t < Tb
            if inside:
                u += band[b, t]
                inside = u <= Ub
            q, e, shift = number(0), number(0), number(0)
            if inside:
                c = cells[b] + cell_of(t, u, Tb, Ub)
                q, e, shift = occ_blank[c], number(occ_label[c] * (1 + fastemit)), lse[c]
            weight = number(q + e)
            if weight <= eps:
                for v in range(lane, V, lanes):
                    put(out, row, v, narrow(0))
                continue
            label = y[b, u] if u < Ub else np.int64(-1)
            for v in range(lane, V, lanes):
                g = number(0)
                if fused:
                    g = math.exp(number(load(x, row, v)) - shift) * weight
                if v == blank:
                    g -= q
                if v == label:
                    g -= e
                if clamp > 0:
                    g = number(clamp) if g > clamp else g
                    g = number(-clamp) if g < -clamp else g
                put(out, row, v, narrow(g * scale[b]))

    @cuda.jit
    def unpack(T, U, cells, occ_label, out):
        """Copy label occupancies to out [B, Umax, Tmax], which holds zeros. Grid (B, any), any number of threads."""
        b = cuda.blockIdx.x
        Tb, Ub = T[b], U[b]
        first = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(first, Tb * Ub, cuda.gridDim.y * cuda.blockDim.x):
            u = i // Tb
            t = i - u * Tb
            out[b, u, t] = occ_label[cells[b] + cell_of(t, u, Tb, Ub)]

    return SimpleNamespace(
        rows=rows, wavefront=wavefront, occupancies=occupancies, gradient=gradient, unpack=unpack, **tdt_kernels(a),
    )  # fmt: skip
