"""int8 states: the standardised state over one float16 scale a token.

Guarantees: state ≈ values · scale · std + mean. The norms are fixed before the first work item is written, so every
writer writes the same bytes.
Try: `pytest tests/extract/store/test_int8.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SCALE_BYTES = 2
LARGEST = 127


@dataclass(frozen=True)
class Quantised:
    """Quantised states."""

    values: np.ndarray  # int8 [..., D]
    scale: np.ndarray  # float16 [...]
    loss: np.ndarray  # float32 [..., 4]: squared lengths of error and state as they are, then standardised

    def __getitem__(self, which: Any) -> Quantised:
        """Select tokens, with all of their dimensions."""
        return Quantised(self.values[which], self.scale[which], self.loss[which])

    def __len__(self) -> int:
        return len(self.values)


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
    _compiled()(values, scale.astype(np.float32), np.array(mean, np.float32), np.array(std, np.float32), whole)
    if whole is not out:
        out[...] = whole


def _dequantise(values: np.ndarray, scale: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    for n in range(values.shape[0]):
        s = scale[n]
        for d in range(values.shape[1]):
            out[n, d] = np.float32(values[n, d]) * s * std[d] + mean[d]


@functools.cache
def _compiled() -> Callable[..., None]:
    """Compile the kernel. Only readers of int8 states call it, since importing numba takes its time."""
    import numba

    signature = "void(i1[:,::1],f4[::1],f4[::1],f4[::1],f4[:,::1])"
    try:
        return numba.njit(signature, nogil=True, cache=True)(_dequantise)
    except RuntimeError:  # There is no folder to keep what is compiled.
        return numba.njit(signature, nogil=True)(_dequantise)


@dataclass(frozen=True)
class Int8Error:
    """How far int8 states are from the model's: a ratio of root mean squares, without a decoder's first tokens."""

    relative: float  # for the states as they are
    standardised: float  # for the standardised ones that training sees


def sum_up(losses: Iterable[list[float]]) -> Int8Error | None:
    """Return the error from sums as `Quantised.loss` counts them; None where there are none."""
    total = np.sum([np.asarray(x, np.float64) for x in losses] or np.zeros((1, 4)), axis=0)
    if not total[1] or not total[3]:
        return None
    return Int8Error(float(np.sqrt(total[0] / total[1])), float(np.sqrt(total[2] / total[3])))
