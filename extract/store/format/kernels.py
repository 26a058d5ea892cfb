"""Stored states to floats, compiled by numba on first use: an array at a time, without the GIL.

Invariant: imported by what reads int8 alone, since numba takes its time to import.
Run: `pytest tests/extract/store/test_int8.py`.
"""

from __future__ import annotations

import numba
import numpy as np


def _dequantise(values: np.ndarray, scale: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    """int8 [N, D] and the scales float32 [N] → float32 [N, D]."""
    for n in range(values.shape[0]):
        s = scale[n]
        for d in range(values.shape[1]):
            out[n, d] = np.float32(values[n, d]) * s * std[d] + mean[d]


_SIGNATURE = "void(i1[:,::1],f4[::1],f4[::1],f4[::1],f4[:,::1])"
try:
    dequantise = numba.njit(_SIGNATURE, nogil=True, cache=True)(_dequantise)
except RuntimeError:  # nowhere to keep what is compiled
    dequantise = numba.njit(_SIGNATURE, nogil=True)(_dequantise)
