"""The search for the weights of decoding with the fewest errors on held-out speech: a coarse grid, then finer points.

Guarantees: every point is measured once, by the search that `decode` runs. Among equal error rates the fewest wrong
characters decide, and then the smaller weights.
Try: `stillhouse decode RUN CORPUS FEATURES --split dev --beam 8 --lm words.arpa --tune lm-weight,ilm-weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ....data.errors import UsageError

FINER = 2  # times that the steps are halved


@dataclass(frozen=True)
class Axis:
    """The values of one weight in the coarse grid: 0, step, 2 * step and so on, `count` of them, and the most ever."""

    step: float
    count: int
    most: float


# The best weights of published recognisers lie inside of these grids, which grow where the best point is on their edge.
AXES = {"lm-weight": Axis(0.25, 4, 2.0), "ilm-weight": Axis(0.15, 3, 0.9), "blank-penalty": Axis(1.0, 3, 4.0)}

Weights = tuple[float, ...]
Measure = Callable[[dict[str, float]], tuple[float, float]]


@dataclass(frozen=True)
class GridPoint:
    """The word and character error rates with some weights, by name."""

    weights: dict[str, float]
    wer: float
    cer: float

    @property
    def rank(self) -> tuple[float, float, float]:
        """What orders points: the best is the least."""
        return self.wer, self.cer, sum(self.weights.values())


def parse_names(text: str) -> list[str]:
    """Return the names in "lm-weight,ilm-weight". Raises UsageError for others."""
    names = list(dict.fromkeys(name.strip().replace("_", "-") for name in text.split(",")))
    if unknown := [name for name in names if name not in AXES]:
        raise UsageError(f"--tune {text}: {unknown[0]!r} cannot be tuned", expected=f"names out of {', '.join(AXES)}")
    return names


def tune(names: Sequence[str], measure: Measure) -> Iterator[GridPoint]:
    """Yield points as they are measured. `measure` returns WER and CER with some weights. The least `rank` is best."""
    axes = [AXES[name] for name in names]
    measured: dict[Weights, GridPoint] = {}

    def new(points: Iterator[Weights]) -> Iterator[GridPoint]:
        for values in points:
            inside = all(0 <= v <= axis.most for v, axis in zip(values, axes))
            if inside and values not in measured:
                weights = dict(zip(names, values))
                measured[values] = GridPoint(weights, *measure(weights))
                yield measured[values]

    def best() -> Weights:
        return min(measured, key=lambda values: measured[values].rank)

    def around(step: float) -> Iterator[Weights]:
        center = best()
        moves = product(*([-step * axis.step, 0.0, step * axis.step] for axis in axes))
        return (tuple(round(c + m, 6) for c, m in zip(center, move)) for move in moves)

    yield from new(product(*([round(k * axis.step, 6) for k in range(axis.count)] for axis in axes)))
    before = None
    while before != best() and any(v >= (axis.count - 1) * axis.step for v, axis in zip(best(), axes)):
        before = best()
        yield from new(around(1.0))
    for halvings in range(1, FINER + 1):
        yield from new(around(0.5**halvings))
