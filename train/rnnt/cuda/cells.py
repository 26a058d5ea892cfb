"""What the CUDA kernels share: the numbering of cells, and the loads, stores and sums of each type of logits.

The source is for numba-cuda and runs in numba's simulator, too. It has no min or max, on which numba's own CUDA target
fails. Cells are numbered along diagonals as on the CPU, by a formula instead of a table: the host plans nothing.
Try: `pytest tests/train/rnnt/test_cuda.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import config, float32, float64
from numba import cuda as _cuda

cuda: Any = _cuda  # Its types are those of the host, not of a kernel.
SIMULATED = bool(getattr(config, "ENABLE_CUDASIM", False))
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
    """Return the number of cell (t, u) among an utterance's T*(U+1), along anti-diagonals."""
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


class Arithmetic:
    """Types and functions for kernels of one kind of logits: float16, bfloat16 (as int16), float32 or float64.

    `real` is the type of shared arrays, `number` that of the arithmetic, `narrow` that of a stored gradient. All kinds
    but float64 compute in float32. Each set of kernels has its own: device functions are compiled for one device.
    """

    def __init__(self, kind: str) -> None:
        exact = kind == "float64"
        number: Any = np.float64 if exact else np.float32
        self.real = float64 if exact else float32
        self.number = number
        self.narrow: Any = np.float16 if kind == "float16" else number
        self.load = cuda.jit(device=True)(_load_bfloat if kind == "bfloat16" else _load_plain)
        self.put = cuda.jit(device=True)(_store_bfloat if kind == "bfloat16" else _store_plain)

        @cuda.jit(device=True)
        def log_add(a, b):
            """Return log(exp(a) + exp(b)) of float64 values. The correction is in the type `number`."""
            high = a if a > b else b
            low = b if a > b else a
            return high + math.log1p(math.exp(number(low - high)))

        self.log_add = log_add
