"""The search for weights: what it finds on known surfaces, and that it measures no point twice."""

from __future__ import annotations

import pytest

from stillhouse.data.errors import UsageError
from stillhouse.train.decode.lm.tune import AXES, FINER, GridPoint, parse_names, tune


def searched(names: list[str], surface) -> tuple[GridPoint, list[GridPoint]]:
    calls: list[tuple[float, ...]] = []

    def measure(weights: dict[str, float]) -> tuple[float, float]:
        assert list(weights) == names
        calls.append(tuple(weights.values()))
        return surface(*weights.values())

    points = list(tune(names, measure))
    assert len(set(calls)) == len(calls) == len(points)
    return min(points, key=lambda point: point.rank), points


@pytest.mark.parametrize("least", [(0.0, 0.0), (0.31, 0.07), (0.7, 0.28), (1.6, 0.6), (0.1, 0.85)])
def test_a_valley_is_found_to_the_finest_step(least: tuple[float, float]) -> None:
    names = ["lm-weight", "ilm-weight"]
    best, points = searched(names, lambda a, b: ((a - least[0]) ** 2 + 2 * (b - least[1]) ** 2, 0.0))
    for name, found, expected in zip(names, best.weights.values(), least):
        assert abs(found - expected) <= AXES[name].step * 0.5**FINER
    coarse = [(round(k * 0.25, 6), round(j * 0.15, 6)) for k in range(4) for j in range(3)]
    assert [tuple(p.weights.values()) for p in points[:12]] == coarse


def test_one_weight_alone() -> None:
    best, points = searched(["lm-weight"], lambda a: (abs(a - 0.4), 0.0))
    assert best.weights == {"lm-weight": 0.375} and len(points) <= 4 + 2 + 2


def test_a_surface_that_falls_for_ever_ends_at_the_bound() -> None:
    best, _ = searched(["lm-weight", "blank-penalty"], lambda a, b: (-a - b, 0.0))
    assert list(best.weights.values()) == [AXES["lm-weight"].most, AXES["blank-penalty"].most]


def test_among_equal_words_characters_decide_and_then_small_weights() -> None:
    best, _ = searched(["lm-weight"], lambda a: (0.2, 0.1 if a >= 0.5 else 0.3))
    assert best.weights["lm-weight"] <= 0.5 and best.cer == 0.1
    assert searched(["lm-weight", "ilm-weight"], lambda a, b: (0.2, 0.1))[0].weights == {
        "lm-weight": 0.0,
        "ilm-weight": 0.0,
    }


def test_names() -> None:
    assert parse_names("lm-weight, ilm_weight,lm-weight") == ["lm-weight", "ilm-weight"]
    with pytest.raises(UsageError, match="'beam' cannot be tuned"):
        parse_names("lm-weight,beam")
