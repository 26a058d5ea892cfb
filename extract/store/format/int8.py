"""int8 states: the standardised state over one float16 scale a token.

Guarantees: state ≈ values · scale · std + mean. The norms are fixed before the first work item is written, so every
writer writes the same bytes.
Try: `pytest tests/extract/store/test_int8.py`.
"""

from __future__ import annotations

import numpy as np

from .quantised import Quantised

SCALE_BYTES = 2
LARGEST = 127


def quantise(states: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Quantised:
    """Quantise states float32 [..., D] by the norms [D] of their view. A state that is not finite has such a scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        z = (states - mean) / std
        scale = (np.abs(z).max(-1) / np.float32(LARGEST)).astype(np.float16)
        wide = scale.astype(np.float32)[..., None]
        values = np.clip(np.rint(z / np.where(wide == 0, np.float32(1), wide)), -LARGEST, LARGEST)
        error = z - values * wide
        loss = np.stack([((v) ** 2).sum(-1) for v in (error * std, states, error, z)], axis=-1)
        return Quantised(values.astype(np.int8), scale, loss)


def dequantise(values: np.ndarray, scale: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    """Fill `out`, float32 or float16 [N, D] and C-contiguous, from values int8 [N, D] and scales float16 [N]."""
    whole = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    from . import kernels

    kernels.dequantise(values, scale.astype(np.float32), np.array(mean, np.float32), np.array(std, np.float32), whole)
    if whole is not out:
        out[...] = whole
