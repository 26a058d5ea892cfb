"""tdt_loss against its float64 reference, finite differences, and transformers' plain-torch loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.train.rnnt import tdt_loss
from stillhouse.train.rnnt.reference import tdt_reference


def make(seed, B=3, T=9, U=5, V=8, durations=(0, 1, 2, 3, 4), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, T, U + 1, V, generator=g, dtype=torch.float64).mul(2).to(dtype)
    steps = torch.randn(B, T, U + 1, len(durations), generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V - 1, (B, U), generator=g)
    T_b, U_b = torch.randint(1, T + 1, (B,), generator=g), torch.randint(0, U + 1, (B,), generator=g)
    T_b[0], U_b[-1] = T, U
    return tokens, steps, targets, T_b, U_b


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), T=st.integers(1, 8), U=st.integers(0, 4), V=st.sampled_from([2, 5, 33]),
    durations=st.sampled_from([(0, 1, 2, 3, 4), (1,), (0, 1), (2, 0, 1), (0, 3), (1, 2, 4)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), sigma=st.sampled_from([0.0, 0.05]),
    fastemit=st.sampled_from([0.0, 0.3]), delay=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_it_is_the_reference(seed, T, U, V, durations, dtype, sigma, fastemit, delay):
    tokens, steps, *rest = make(seed, T=T, U=U, V=V, durations=durations, dtype=dtype)
    options = dict(durations=durations, sigma=sigma, fastemit_lambda=fastemit, delay_penalty=delay)
    expected = tdt_reference(tokens.double(), steps.double(), *rest, **options)
    tokens.requires_grad_(), steps.requires_grad_()
    costs, occupancy = tdt_loss(tokens, steps, *rest, reduction="none", return_occupancy=True, **options)
    costs.sum().backward()
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    np.testing.assert_allclose(costs.detach(), expected.costs, rtol=min(tolerance, 1e-5), atol=1e-5)
    np.testing.assert_allclose(tokens.grad.double(), expected.gradient, atol=tolerance * 2)
    np.testing.assert_allclose(steps.grad.double(), expected.duration_gradient, atol=tolerance * 2)
    np.testing.assert_allclose(occupancy, expected.occupancy, atol=1e-5)


def test_gradcheck():
    tokens, steps, *rest = make(2, B=2, T=4, U=2, V=3, durations=(0, 1, 2))
    inputs = tokens.requires_grad_(), steps.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: tdt_loss(a, b, *rest, durations=(0, 1, 2), sigma=0.02, delay_penalty=0.1), inputs
    )


def test_duration_one_alone():
    """With one duration its softmax is 1; labels then move a frame on, too: at most T units fit."""
    tokens, steps, targets, T, U = make(4, T=4, U=5, durations=(1,))
    costs = tdt_loss(tokens, steps, targets, T, U, durations=(1,), reduction="none")
    assert torch.isinf(costs).tolist() == (U >= T).tolist()


def test_it_is_transformers():
    loss_tdt = pytest.importorskip("transformers.loss.loss_tdt")
    tokens, steps, targets, _, _ = make(5, dtype=torch.float32)
    T, U = torch.tensor([9, 6, 8]), torch.tensor([5, 2, 5])
    durations = [0, 1, 2, 3, 4]
    grads = []
    for ours in (False, True):
        a, b = tokens.clone().requires_grad_(), steps.clone().requires_grad_()
        if ours:
            loss = tdt_loss(a, b, targets, T, U, 7, durations, 0.05, "sum")
        else:
            loss = loss_tdt.tdt_loss(a, b, targets, T, U, 7, durations, 0.05, "sum")
        loss.backward()
        grads.append((loss.detach(), a.grad, b.grad))
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_guards():
    tokens, steps, *rest = make(1)
    with pytest.raises(ValueError, match="5 duration logits need as many"):
        tdt_loss(tokens, steps, *rest, durations=(0, 1, 2))
    with pytest.raises(ValueError, match="one above 0"):
        tdt_loss(tokens, steps[..., :1], *rest, durations=(0,))
    with pytest.raises(TypeError, match="share a floating dtype"):
        tdt_loss(tokens, steps.float(), *rest)
    with pytest.raises(ValueError, match=r"row 1 .* target length 9"):
        tdt_loss(tokens, steps, rest[0], rest[1], torch.tensor([1, 9, 1]))
    tokens[1, 0, 0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="row 1"):
        costs = tdt_loss(tokens, steps, *rest, reduction="none")
    assert torch.isnan(costs).tolist() == [False, True, False]
