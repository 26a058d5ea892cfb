"""Mixing: weights, and that sampling is unbiased."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from stillhouse.data.errors import ConfigError
from stillhouse.distill.mixing import Mixing, draw


def test_mean_sum_and_learned():
    losses = [torch.tensor(1.0), torch.tensor(4.0)]
    assert Mixing("mean", 3)(losses, [0, 2]).item() == 2.5
    assert Mixing("sum", 3)(losses, [0, 2]).item() == 5.0
    learned = Mixing("learned", 3)
    assert learned(losses, [0, 2]).item() == 2.5
    with torch.no_grad():
        learned.logits.copy_(torch.tensor([0.0, 9.0, 1.0]).log().clamp_min(-50))
    # e^0 of view 0 counts 0 here: log 0 is clamped; views 0 and 2 weigh 0 : 1
    assert learned(losses, [0, 2]).item() == pytest.approx(4.0)
    weights = learned.logged(["a", "b", "c"])
    assert [round(w.item(), 4) for w in weights.values()] == [0, 0.9, 0.1]
    assert not any(w.requires_grad for w in weights.values())
    assert Mixing("mean", 3).logged(["a"]) == {} and not list(Mixing("sample", 3).parameters())


def test_learned_weights_have_a_gradient_even_for_a_batch_without_targets():
    learned = Mixing("learned", 2)
    learned.idle().backward()
    assert learned.logits.grad.tolist() == [0, 0]


def test_sample_is_unbiased():
    """Over many steps every subset comes equally often, so the expected mean is the mean over all views."""
    steps = 6000
    drawn = Counter(tuple(draw(4, 2, seed=11, step=s)) for s in range(steps))
    subsets = list(itertools.combinations(range(4), 2))
    assert set(drawn) == set(subsets)
    expected = steps / len(subsets)
    chi_square = sum((drawn[s] - expected) ** 2 / expected for s in subsets)
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001
    losses = [0.3, 1.0, 2.5, 7.0]
    mean = sum(n * sum(losses[i] for i in s) / 2 for s, n in drawn.items()) / steps
    assert mean == pytest.approx(sum(losses) / 4, rel=0.02)


def test_draws_repeat_for_a_resumed_run_and_differ_between_seeds():
    first = [draw(6, 2, 1, s) for s in range(20)]
    assert first == [draw(6, 2, 1, s) for s in range(20)] != [draw(6, 2, 2, s) for s in range(20)]


def test_unknown_mixing():
    with pytest.raises(ConfigError, match="no mixing 'median'"):
        Mixing("median", 2)
