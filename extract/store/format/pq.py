"""Product quantisation: M codes of 8 bits a row, each the number of the nearest of 256 vectors of its codebook.

A state is standardised and cut into M parts of D / M dimensions. The codebooks are learned by k-means on a sample of
rows that the plan decides. Standardising first gives every dimension one weight, as training does, so that the few
dimensions with huge values do not use up the codes.

Guarantees: state ≈ codebook[m, code[m]] · std + mean for the dimensions of each part m. Every sum has one order, so
the codebooks and the codes of a state do not depend on threads, batches or processors.
Try: `pytest tests/extract/store/test_pq.py`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .quantised import Quantised

CENTROIDS = 256
ROWS = 32_768  # of a sample, at most: 128 for each vector. More lower the error by 1 % and take as much longer.
ITERATIONS = 10


def learn(sample: np.ndarray, mean: np.ndarray, std: np.ndarray, codes: int) -> np.ndarray:
    """Return codebooks float16 [M, 256, D/M] for standardised states, learned from states float32 [S ≥ 1, D]."""
    from .kernels import kmeans

    books = np.empty((codes, CENTROIDS, sample.shape[1] // codes), np.float16)

    def learn_part(m: int) -> None:
        dimensions = slice(m * books.shape[2], (m + 1) * books.shape[2])
        part = np.ascontiguousarray((sample[:, dimensions] - mean[dimensions]) / std[dimensions])
        draws = np.random.default_rng([CENTROIDS, m]).random(CENTROIDS)
        book = np.empty((CENTROIDS, part.shape[1]), np.float32)
        kmeans(part, draws, ITERATIONS, book)
        books[m] = book

    with ThreadPoolExecutor(min(codes, os.cpu_count() or 1), "stillhouse-codebooks") as threads:
        list(threads.map(learn_part, range(codes)))
    return books


def encode_pq(states: np.ndarray, mean: np.ndarray, std: np.ndarray, book: np.ndarray) -> Quantised:
    """Quantise states float32 [..., D] by the norms [D] of their view and its codebooks float [M, 256, D/M].

    The loss of a state that is not finite is not finite.
    """
    from .kernels import encode

    rows = np.ascontiguousarray(states, np.float32).reshape(-1, states.shape[-1])
    codes, loss = np.empty((len(rows), len(book)), np.uint8), np.empty((len(rows), 4), np.float32)
    encode(rows, *(np.array(v, np.float32) for v in (mean, std, book)), codes, loss)
    shape = states.shape[:-1]
    return Quantised(codes.reshape(*shape, len(book)), None, loss.reshape(*shape, 4))


def decoding_table(mean: np.ndarray, std: np.ndarray, book: np.ndarray, *, dtype: Any) -> np.ndarray:
    """Return what each code stands for, [M, 256, D/M] in a floating dtype: `codebook · std + mean`."""
    codes, _, width = book.shape
    wide = book.astype(np.float32) * std.reshape(codes, 1, width) + mean.reshape(codes, 1, width)
    with np.errstate(over="ignore"):
        return wide.astype(dtype)


def decode_pq(codes: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` [N, D], C-contiguous, from codes uint8 [N, M] and the table of `decoding_table` in its dtype."""
    from .kernels import decode

    bits = np.dtype(f"u{out.dtype.itemsize}")  # numba has no float16
    decode(codes, table.view(bits), out.view(bits))
