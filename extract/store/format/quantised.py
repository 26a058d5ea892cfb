"""What int8 and pq have in common: quantised states, and how far they are from the model's.

Try: `pytest tests/extract/store/test_int8.py tests/extract/store/test_pq.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Quantised:
    """Quantised states. A state that is not finite has such a scale, or with pq such a loss."""

    values: np.ndarray  # int8 [..., D], or the codes of pq, uint8 [..., M]
    scale: np.ndarray | None  # float16 [...]; pq has none
    loss: np.ndarray  # float32 [..., 4]: squared lengths of error and state as they are, then standardised

    def __getitem__(self, which: Any) -> Quantised:
        """Select tokens, with all of their dimensions."""
        return Quantised(self.values[which], None if self.scale is None else self.scale[which], self.loss[which])

    @property
    def finite(self) -> bool:
        """Whether all states are."""
        return bool(np.isfinite(self.loss if self.scale is None else self.scale).all())

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class QuantisationError:
    """How far quantised states are from the model's: a ratio of root mean squares, without a decoder's first tokens."""

    relative: float  # for the states as they are
    standardised: float  # for the standardised ones that training sees


def sum_up(losses: Iterable[list[float]]) -> QuantisationError | None:
    """Return the error from sums as `Quantised.loss` counts them; None where there are none."""
    total = np.sum([np.asarray(x, np.float64) for x in losses] or np.zeros((1, 4)), axis=0)
    if not total[1] or not total[3]:
        return None
    return QuantisationError(float(np.sqrt(total[0] / total[1])), float(np.sqrt(total[2] / total[3])))
