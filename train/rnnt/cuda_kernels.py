"""The CUDA kernels: the CPU path's three stages, one block an utterance's lattice, many blocks its rows.

Written for numba-cuda; the same source runs in numba's simulator. No warp shuffles (the simulator has none), no
min/max (numba's own CUDA target fails on them), 64-bit offsets everywhere, threads stride over whatever is longer than
a block. Cells are numbered along diagonals as in cpu.py, by a formula instead of a table: nothing is planned on the
host. No GPU has run these kernels yet. Run: pytest tests/rnnt/test_cuda.py
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import config, float32, float64
from numba import cuda as _cuda

cuda: Any = _cuda  # its types are those of the host, not of a kernel
SIMULATED = bool(getattr(config, "ENABLE_CUDASIM", False))
THREADS = 256  # the most threads of a block that the shared arrays below have room for
CLOSED = -1e30
IMPOSSIBLE = -1e29

if SIMULATED:

    def int_as_float(bits):
        return np.uint32(bits).view(np.float32)

    def float_as_int(value):
        return int(np.float32(value).view(np.int32))
else:
    from numba.cuda.libdevice import float_as_int, int_as_float


@cuda.jit(device=True)
def cell_of(t, u, T, U):
    """Number of cell (t, u) among an utterance's T*(U+1), along anti-diagonals."""
    n = t + u
    short = T if T < U + 1 else U + 1
    long = T + U + 1 - short
    low = n - T + 1 if n >= T else 0
    if n <= short:
        start = n * (n + 1) // 2
    elif n <= long:
        start = short * (short + 1) // 2 + short * (n - short)
    else:
        rest = short + long - 1 - n
        start = T * (U + 1) - rest * (rest + 1) // 2
    return start + u - low


def _load_plain(array, row, i):
    return array[row, i]


def _store_plain(array, row, i, value):
    array[row, i] = value


def _load_bfloat(array, row, i):
    return int_as_float((np.int32(array[row, i]) & np.int32(0xFFFF)) << np.int32(16))


def _store_bfloat(array, row, i, value):
    if value != value:
        array[row, i] = 0x7FC0
    else:
        bits = float_as_int(value)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
        array[row, i] = rounded - 65536 if rounded > 32767 else rounded  # as int16


@cache
def kernels(kind: str) -> SimpleNamespace:
    """Kernels for logits of `kind`: float16, bfloat16 (as int16), float32, float64; all but the last add in float32."""
    exact = kind == "float64"
    real = float64 if exact else float32
    number: Any = np.float64 if exact else np.float32
    narrow: Any = np.float16 if kind == "float16" else number
    load = cuda.jit(device=True)(_load_bfloat if kind == "bfloat16" else _load_plain)
    put = cuda.jit(device=True)(_store_bfloat if kind == "bfloat16" else _store_plain)

    @cuda.jit(device=True)
    def log_add(a, b):
        """float64 values; the correction is in the type that is computed in."""
        high = a if a > b else b
        low = b if a > b else a
        return high + math.log1p(math.exp(number(low - high)))

    @cuda.jit
    def rows(
        x, y, T, U, first, per_frame, band, cells, b0, t0, t1, lse, blank_lp, label_lp, blank, delay, fused
    ):  # fmt: skip
        """Stage 1. Grid (utterances from b0, any); block (lanes a row: a power of two, rows at once).

        Frames t0..min(t1, T). Row of cell (t, u): first[b] + t*per_frame[b] + u - band[b, t].
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
        """Stage 2. Grid (B, 2): alphas in blocks y = 0, betas in blocks y = 1; any number of threads."""
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
        """blank_lp and label_lp become occupancies, costs [B] the losses. Grid (B, any), any number of threads."""
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
        """Stage 3 for frames t0..t1 of the layout, padding included (t1 < 0: to the utterance's end); out may be x.

        Grid and block as in rows.
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
        """Label occupancies into out [B, Umax, Tmax], which comes zeroed. Grid (B, any), any number of threads."""
        b = cuda.blockIdx.x
        Tb, Ub = T[b], U[b]
        first = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(first, Tb * Ub, cuda.gridDim.y * cuda.blockDim.x):
            u = i // Tb
            t = i - u * Tb
            out[b, u, t] = occ_label[cells[b] + cell_of(t, u, Tb, Ub)]

    @cuda.jit
    def durations_in(z, T, U, first, per_frame, cells, dur, sigma):
        """Log-probabilities of the durations, minus sigma, into dur [D, cells]. Grid (B, any), any threads."""
        b = cuda.blockIdx.x
        Tb, Ub, D = T[b], U[b], z.shape[1]
        start = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(start, Tb * (Ub + 1), cuda.gridDim.y * cuda.blockDim.x):
            t = i // (Ub + 1)
            u = i - t * (Ub + 1)
            row = first[b] + t * per_frame[b] + u
            c = cells[b] + cell_of(t, u, Tb, Ub)
            high = number(load(z, row, 0))
            for j in range(1, D):
                value = number(load(z, row, j))
                high = high if value <= high else value
            total = number(0)
            for j in range(D):
                total += math.exp(number(load(z, row, j)) - high)
            for j in range(D):
                value = number(load(z, row, j)) - high - math.log(total)
                value = number(CLOSED) if value < number(CLOSED) else value
                dur[j, c] = value - number(sigma)

    @cuda.jit
    def durations_out(z, out, T, U, first, per_frame, cells, dur, scale):
        """Gradient of the duration logits into out, which comes zeroed. Grid (B, any), any threads."""
        b = cuda.blockIdx.x
        Tb, Ub, D = T[b], U[b], z.shape[1]
        start = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(start, Tb * (Ub + 1), cuda.gridDim.y * cuda.blockDim.x):
            t = i // (Ub + 1)
            u = i - t * (Ub + 1)
            row = first[b] + t * per_frame[b] + u
            c = cells[b] + cell_of(t, u, Tb, Ub)
            high = number(load(z, row, 0))
            gamma = number(0)
            for j in range(D):
                value = number(load(z, row, j))
                high = high if value <= high else value
                gamma += dur[j, c]
            total = number(0)
            for j in range(D):
                total += math.exp(number(load(z, row, j)) - high)
            for j in range(D):
                p = math.exp(number(load(z, row, j)) - high) / total
                put(out, row, j, narrow((p * gamma - dur[j, c]) * scale[b]))

    @cuda.jit
    def tdt_wavefront(T, U, cells, blank_lp, label_lp, dur, durations, alpha, beta):
        """Stage 2 of the token-and-duration transducer; grid and block as in wavefront."""
        b = cuda.blockIdx.x
        Tb, Ub, base, D = T[b], U[b], cells[b], durations.shape[0]
        me, threads = cuda.threadIdx.x, cuda.blockDim.x
        for step in range(Tb + Ub):
            n = step if cuda.blockIdx.y == 0 else Tb + Ub - 1 - step
            low = n - Tb + 1 if n >= Tb else 0
            high = n if n < Ub else Ub
            for u in range(low + me, high + 1, threads):
                t = n - u
                own = base + cell_of(t, u, Tb, Ub)
                value = CLOSED
                if cuda.blockIdx.y == 0:
                    value = 0.0 if n == 0 else CLOSED
                    for j in range(D):
                        s = t - durations[j]
                        if s >= 0 and s < t:
                            c = base + cell_of(s, u, Tb, Ub)
                            value = log_add(value, alpha[c] + blank_lp[c] + dur[j, c])
                        if s >= 0 and u > 0:
                            c = base + cell_of(s, u - 1, Tb, Ub)
                            value = log_add(value, alpha[c] + label_lp[c] + dur[j, c])
                    alpha[own] = value
                else:
                    for j in range(D):
                        s = t + durations[j]
                        if s > t and s < Tb:
                            c = base + cell_of(s, u, Tb, Ub)
                            value = log_add(value, beta[c] + blank_lp[own] + dur[j, own])
                        elif s > t and s == Tb and u == Ub:
                            value = log_add(value, float64(blank_lp[own]) + dur[j, own])
                        if s < Tb and u < Ub:
                            c = base + cell_of(s, u + 1, Tb, Ub)
                            value = log_add(value, beta[c] + label_lp[own] + dur[j, own])
                    beta[own] = value
            cuda.syncthreads()

    @cuda.jit
    def tdt_occupancies(T, U, cells, blank_lp, label_lp, dur, durations, alpha, beta, costs, fastemit):
        """As occupancies; dur becomes the durations', label arcs counted 1 + fastemit times."""
        b = cuda.blockIdx.x
        Tb, Ub, base, D = T[b], U[b], cells[b], durations.shape[0]
        total = beta[base]
        possible = not (total < IMPOSSIBLE)
        first = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if first == 0:
            costs[b] = -total if possible else math.inf
        for i in range(first, Tb * (Ub + 1), cuda.gridDim.y * cuda.blockDim.x):
            t = i // (Ub + 1)
            u = i - t * (Ub + 1)
            c = base + cell_of(t, u, Tb, Ub)
            stays, moves = number(0), number(0)
            for j in range(D):
                s = t + durations[j]
                rest = alpha[c] - total + dur[j, c]
                q, e = number(0), number(0)
                if possible:
                    if s > t and s < Tb:
                        q = math.exp(number(rest + blank_lp[c] + beta[base + cell_of(s, u, Tb, Ub)]))
                    elif s > t and s == Tb and u == Ub:
                        q = math.exp(number(rest + blank_lp[c]))
                    if s < Tb and u < Ub:
                        e = math.exp(number(rest + label_lp[c] + beta[base + cell_of(s, u + 1, Tb, Ub)]))
                stays += q
                moves += e
                dur[j, c] = q + number(1 + fastemit) * e
            blank_lp[c] = stays
            label_lp[c] = moves

    return SimpleNamespace(
        rows=rows, wavefront=wavefront, occupancies=occupancies, gradient=gradient, unpack=unpack,
        durations_in=durations_in, durations_out=durations_out, tdt_wavefront=tdt_wavefront,
        tdt_occupancies=tdt_occupancies,
    )  # fmt: skip
