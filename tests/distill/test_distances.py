"""Distances against literals worked by hand and against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.data.errors import ConfigError
from stillhouse.distill.distances import distance_named

KEY = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0.0, 1 - 4 / (5 * 1)]),  # parallel; (3, 4) against (0, 1)
        ("l1", [1.5, (3 + 3) / 2]),
        ("mse", [(1 + 4) / 2, (9 + 9) / 2]),
        ("smooth_l1", [(0.5 + 1.5) / 2, (2.5 + 2.5) / 2]),
    ],
)
def test_literals(name, expected):
    prediction = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    target = torch.tensor([[2.0, 4.0], [0.0, 1.0]])
    assert distance_named(name)(prediction, target, KEY).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "mse"])
def test_a_mean_over_dimensions_not_a_sum(name):
    a, b = torch.randn(3, 8, generator=torch.manual_seed(0)), torch.zeros(3, 8)
    distance, key = distance_named(name), torch.arange(3)
    torch.testing.assert_close(distance(a, b, key), distance(a.repeat(1, 5), b.repeat(1, 5), key))


def test_contrastive_leaves_other_occurrences_of_a_token_out():
    generator = torch.manual_seed(1)
    prediction, target = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    key = torch.tensor([7, 8, 7, 9, 8])
    found = distance_named("contrastive", temperature=0.5)(prediction, target, key)
    for i in range(5):
        scores = {
            j: torch.cosine_similarity(prediction[i], target[j], dim=0).item() / 0.5
            for j in range(5)
            if j == i or key[j] != key[i]
        }
        expected = math.log(sum(math.exp(s) for s in scores.values())) - scores[i]
        assert found[i].item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_with_nothing_to_contrast_is_zero_with_a_finite_gradient():
    prediction = torch.randn(3, 4, generator=torch.manual_seed(2)).requires_grad_()
    loss = distance_named("contrastive")(prediction, torch.ones(3, 4), torch.zeros(3, dtype=torch.long))
    assert loss.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    loss.sum().backward()
    assert prediction.grad.isfinite().all()


def test_a_prediction_of_zero_has_a_finite_gradient():
    prediction = torch.zeros(2, 3, requires_grad=True)
    for name in ("cosine", "contrastive"):
        distance_named(name)(prediction, torch.ones(2, 3), KEY).sum().backward()
    assert prediction.grad.isfinite().all()


def test_unknown_names_list_the_known():
    with pytest.raises(ConfigError, match=r"no distance 'cos'.*smooth_l1"):
        distance_named("cos")
    with pytest.raises(ConfigError, match="temperature must be positive"):
        distance_named("contrastive", temperature=0)
