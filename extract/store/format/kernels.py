"""The loops of int8 and pq that numba compiles at their first call.

Guarantees: every sum has one order, and no two operations are contracted into one, so all processors give the same
bits. Only functions that quantise or decode import this module, since importing numba takes its time.
Try: `pytest tests/extract/store/test_int8.py tests/extract/store/test_pq.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def compiled(function: Callable[..., None]) -> Callable[..., Any]:
    """Compile a function without the interpreter's lock, and keep what is compiled on the disk where that works."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # There is no folder to keep it.
        return numba.njit(nogil=True)(function)


@compiled
def dequantise(values: np.ndarray, scale: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    """Fill out float32 [N, D] from values int8 [N, D] and scales float32 [N]."""
    for n in range(values.shape[0]):
        s = scale[n]
        for d in range(values.shape[1]):
            out[n, d] = np.float32(values[n, d]) * s * std[d] + mean[d]


@compiled
def nearest(x: np.ndarray, at: int, book: np.ndarray, labels: np.ndarray, m: int) -> None:
    """Fill column m of labels uint8 [N, M] with the nearest vector of book [d, 256] to columns at … at + d of x.

    Of vectors that are equally near, the first one is taken. Four rows at a time share what they load.
    """
    half = np.zeros(256, np.float32)
    near = np.empty((4, 256), np.float32)
    bits = near.view(np.int32)
    for i in range(book.shape[0]):
        for k in range(256):
            half[k] += book[i, k] * book[i, k] * np.float32(0.5)
    for first in range(0, x.shape[0], 4):
        last = x.shape[0] - 1
        a, b, c, d = first, min(first + 1, last), min(first + 2, last), min(first + 3, last)
        for k in range(256):
            near[0, k] = near[1, k] = near[2, k] = near[3, k] = half[k]
        for i in range(book.shape[0]):
            p, q, r, s = x[a, at + i], x[b, at + i], x[c, at + i], x[d, at + i]
            for k in range(256):
                v = book[i, k]
                near[0, k] -= p * v
                near[1, k] -= q * v
                near[2, k] -= r * v
                near[3, k] -= s * v
        for row in range(min(4, x.shape[0] - first)):
            # As integers in the order of the floats, which vector instructions compare.
            least = np.int32(0x7FFFFFFF)
            for k in range(256):
                bits[row, k] ^= (bits[row, k] >> np.int32(31)) & np.int32(0x7FFFFFFF)
                least = min(least, bits[row, k])
            found = np.int32(256)
            for k in range(256):
                found = min(found, np.int32(k) if bits[row, k] == least else np.int32(256))
            labels[first + row, m] = found


@compiled
def kmeans(x: np.ndarray, draws: np.ndarray, iterations: int, book: np.ndarray) -> None:
    """Fill book float32 [256, d] from rows float32 [S, d]: k-means++ by `draws` in [0, 1), then Lloyd's iterations.

    k-means++ takes one row after another, each in proportion to its squared distance from the nearest one so far
    (Arthur and Vassilvitskii 2007). At most 8,192 of the rows are candidates.
    """
    rows, width = x.shape
    step = (rows + 8191) // 8192
    distance = np.full(rows, np.inf, np.float32)
    chosen = int(draws[0] * rows)
    for k in range(256):
        book[k] = x[chosen]
        total = 0.0
        for n in range(0, rows, step):
            squared = np.float32(0)
            for i in range(width):
                difference = x[n, i] - book[k, i]
                squared += difference * difference
            distance[n] = min(distance[n], squared)
            total += distance[n]
        if k < 255:
            target, chosen = draws[k + 1] * total, 0
            for n in range(
                0, rows, step
            ):  # Where fewer rows differ than there are vectors, the rest are copies of the first.
                target -= distance[n]
                if target < 0 and distance[n] > 0:
                    chosen = n
                    break
    by_dimension = np.empty((width, 256), np.float32)
    label = np.empty((rows, 1), np.uint8)
    for _ in range(iterations):
        by_dimension[:] = book.T
        nearest(x, 0, by_dimension, label, 0)
        total_of = np.zeros((256, width), np.float64)
        count = np.zeros(256, np.int64)
        for n in range(rows):
            k = label[n, 0]
            count[k] += 1
            for i in range(width):
                total_of[k, i] += x[n, i]
        for k in range(256):
            for i in range(width if count[k] else 0):
                book[k, i] = total_of[k, i] / count[k]


@compiled
def encode(
    states: np.ndarray, mean: np.ndarray, std: np.ndarray, book: np.ndarray, codes: np.ndarray, loss: np.ndarray
) -> None:
    """Fill codes uint8 [N, M] and loss float32 [N, 4] for states [N, D], norms [D] and codebooks [M, 256, D/M]."""
    parts, _, width = book.shape
    by_dimension = np.empty((parts, width, 256), np.float32)
    for m in range(parts):
        by_dimension[m] = book[m].T
    z = np.empty((64, parts * width), np.float32)  # Rows stay in the processor's cache while the parts go by.
    for first in range(0, states.shape[0], 64):
        count = min(64, states.shape[0] - first)
        for n in range(count):
            for i in range(parts * width):
                z[n, i] = (states[first + n, i] - mean[i]) / std[i]
        for m in range(parts):
            nearest(z[:count], m * width, by_dimension[m], codes[first : first + count], m)
        for n in range(count):
            error = state = error_z = state_z = np.float32(0)
            for m in range(parts):
                k = codes[first + n, m]
                for i in range(width):
                    at = m * width + i
                    lost = z[n, at] - book[m, k, i]
                    error += lost * std[at] * (lost * std[at])
                    state += states[first + n, at] * states[first + n, at]
                    error_z += lost * lost
                    state_z += z[n, at] * z[n, at]
            loss[first + n, 0], loss[first + n, 1] = error, state
            loss[first + n, 2], loss[first + n, 3] = error_z, state_z


@compiled
def decode(codes: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    width = table.shape[2]
    for n in range(codes.shape[0]):
        for m in range(codes.shape[1]):
            k = codes[n, m]
            for i in range(width):
                out[n, m * width + i] = table[m, k, i]
