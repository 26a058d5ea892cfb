"""CUDA kernels of the token-and-duration transducer: its lattice along diagonals, and the duration head's rows.

They compute what ../cpu/tdt.py does. Token rows are those of kernels.py. No GPU has run these kernels yet.
Guarantees: dur [D, cells] holds log-probabilities before the lattice, and occupancies after it.
Try: `pytest tests/train/rnnt/test_cuda.py`.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float64

from .cells import CLOSED, IMPOSSIBLE, Arithmetic, cell_of, cuda


def tdt_kernels(a: Arithmetic) -> dict[str, Any]:
    """Return the kernels by name."""
    number, narrow, load, put, log_add = a.number, a.narrow, a.load, a.put, a.log_add

    @cuda.jit
    def durations_in(z, T, U, first, per_frame, cells, dur, sigma):
        """Write the durations' log-probabilities, minus sigma, to dur [D, cells]. Grid (B, any), any threads."""
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
        """Write the gradient of the duration logits to out, which holds zeros. Grid (B, any), any threads."""
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
        """Run stage 2 of the token-and-duration transducer. Grid and block as in wavefront."""
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
        """Do what occupancies does. dur becomes the durations' occupancies, with label arcs 1 + fastemit times."""
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

    return {
        "durations_in": durations_in,
        "durations_out": durations_out,
        "tdt_wavefront": tdt_wavefront,
        "tdt_occupancies": tdt_occupancies,
    }
