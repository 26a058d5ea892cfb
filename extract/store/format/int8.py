"""int8 states: the standardised state over one float16 scale a token.

Invariant: state ≈ values · scale · std + mean, with the norms that were fixed before the first unit was written, so
whoever writes a row writes the same bytes. Run: `pytest tests/extract/store/test_int8.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SCALE_BYTES = 2
LARGEST = 127


@dataclass(frozen=True)
class Quantised:
    """values int8 [..., D], scale float16 [...] and what was lost, float32 [..., 4]: the squared lengths of error and
    state, as they are and standardised.
    """

    values: np.ndarray
    scale: np.ndarray
    loss: np.ndarray

    def __getitem__(self, which: Any) -> Quantised:
        """Of tokens; all of their dimensions."""
        return Quantised(self.values[which], self.scale[which], self.loss[which])

    def __len__(self) -> int:
        return len(self.values)


def quantise(states: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Quantised:
    """States float32 [..., D] with the norms [D] of their view. A state that is not finite has such a scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        z = (states - mean) / std
        scale = (np.abs(z).max(-1) / np.float32(LARGEST)).astype(np.float16)
        wide = scale.astype(np.float32)[..., None]
        values = np.clip(np.rint(z / np.where(wide == 0, np.float32(1), wide)), -LARGEST, LARGEST)
        error = z - values * wide
        loss = np.stack([((v) ** 2).sum(-1) for v in (error * std, states, error, z)], axis=-1)
        return Quantised(values.astype(np.int8), scale, loss)


def dequantise(values: np.ndarray, scale: np.ndarray, mean: np.ndarray, std: np.ndarray, out: np.ndarray) -> None:
    """int8 [N, D] and float16 [N] → `out` float32 or float16 [N, D], C-contiguous."""
    from .kernels import dequantise as kernel

    whole = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    kernel(values, scale.astype(np.float32), np.array(mean, np.float32), np.array(std, np.float32), whole)
    if whole is not out:
        out[...] = whole


@dataclass(frozen=True)
class Int8Error:
    """How far int8 states are from the model's, as a ratio of root mean squares over all tokens: of the states as
    they are, and of the standardised ones that training sees.
    """

    relative: float
    standardised: float


def sum_up(losses: Iterable[list[float]]) -> Int8Error | None:
    """From sums as `Quantised.loss` counts them; None where there are none."""
    total = np.sum([np.asarray(x, np.float64) for x in losses] or np.zeros((1, 4)), axis=0)
    if not total[1] or not total[3]:
        return None
    return Int8Error(float(np.sqrt(total[0] / total[1])), float(np.sqrt(total[2] / total[3])))
