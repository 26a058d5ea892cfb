"""Property tests: any batch, any options, every implementation against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint
from stillhouse.train.rnnt.cpu import joint
from stillhouse.train.rnnt.reference import rnnt_reference

SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def batches(draw):
    """Shapes, lengths, blank, scale of the logits, options."""
    B, T, U = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 6))
    V = draw(st.sampled_from([2, 3, 7, 16, 17, 31, 33, 48, 65, 100]))
    blank = draw(st.integers(-V, V - 1))
    T_b = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    U_b = draw(st.lists(st.integers(0, U), min_size=B, max_size=B))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 3.0, 20.0]))
    logits = torch.randn(B, T, U + 1, V, generator=g, dtype=torch.float64) * scale
    units = torch.tensor([v for v in range(V) if v != blank % V])
    targets = units[torch.randint(0, V - 1, (B, U), generator=g)]
    options = dict(
        blank=blank,
        clamp=draw(st.sampled_from([-1.0, 0.02, 0.5])),
        fastemit_lambda=draw(st.sampled_from([0.0, 0.01, 1.5])),
        delay_penalty=draw(st.sampled_from([0.0, 0.05, -0.3])),
    )
    weight = torch.randn(B, generator=g)
    integer = draw(st.sampled_from([torch.int32, torch.int64]))
    lengths = torch.tensor(T_b, dtype=integer), torch.tensor(U_b, dtype=integer)
    return logits, targets.to(integer), *lengths, options, weight


def packed(logits, T, U):
    return torch.cat([logits[b, :t, : u + 1].reshape(-1, logits.shape[-1]) for b, (t, u) in enumerate(zip(T, U))])


TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@SETTINGS
@given(
    case=batches(), dtype=st.sampled_from(list(TOLERANCE)), inplace=st.booleans(), is_packed=st.booleans(),
    fused=st.booleans(),
)  # fmt: skip
def test_loss_is_the_reference(case, dtype, inplace, is_packed, fused):
    logits, y, T, U, options, weight = case
    if not fused:
        logits = logits.log_softmax(-1)
    x = logits.to(dtype)
    expected = rnnt_reference(x.double(), y, T, U, fused_log_softmax=fused, **options)
    gradient = torch.from_numpy(expected.gradient) * weight.double().view(-1, 1, 1, 1)
    if is_packed:
        x, gradient = packed(x, T, U), packed(gradient, T, U)
    x = x.clone().requires_grad_()
    costs, occupancy = rnnt_loss(
        x, y, T, U, reduction="none", inplace=inplace, layout="packed" if is_packed else "padded",
        fused_log_softmax=fused, return_occupancy=True, **options,
    )  # fmt: skip
    costs.backward(weight.to(costs.dtype))
    np.testing.assert_allclose(costs.detach(), expected.costs, rtol=min(TOLERANCE[dtype], 1e-5), atol=1e-5)
    size = max(1.0, float(gradient.abs().max()) if gradient.numel() else 0.0)
    # float32 logits of size s carry s * 6e-8 of rounding into every score
    slack = TOLERANCE[dtype] * size * (1 + float(logits.abs().max()) / 20 if dtype != torch.float64 else 1)
    np.testing.assert_allclose(x.grad.double(), gradient, rtol=0, atol=slack)
    found = occupancy.numpy()[:, :, : expected.occupancy.shape[2]]
    np.testing.assert_allclose(found, expected.occupancy[:, :, : found.shape[2]], atol=3e-5)


@SETTINGS
@given(case=batches(), tile=st.integers(1, 40), mul=st.booleans(), relu=st.booleans(), seed=st.integers(0, 1000))
def test_joint_is_the_loss(case, tile, mul, relu, seed):
    logits, y, T, U, options, weight = case
    B, Tmax, U1, V = logits.shape
    g = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
        for s in ((B, Tmax, 5), (B, U1, 5), (V, 5), (V,))
    ]
    e, p, w, c = parts
    hidden = e[:, :, None] * p[:, None] if mul else e[:, :, None] + p[:, None]
    full = (torch.relu(hidden) if relu else torch.tanh(hidden)) @ w.t() + c
    expected = torch.autograd.grad(rnnt_loss(full, y, T, U, reduction="none", **options), parts, weight.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "tile_rows", lambda vocabulary: tile)
        costs = rnnt_loss_joint(
            *parts, y, T, U, reduction="none", eps=0, combine="mul" if mul else "add",
            activation="relu" if relu else "tanh", **options,
        )  # fmt: skip
        found = torch.autograd.grad(costs, parts, weight.double())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@SETTINGS
@given(case=batches(), eps=st.sampled_from([1e-6, 1e-3, 1e-2]))
def test_eps_changes_the_gradient_by_about_eps(case, eps):
    logits, y, T, U, options, _ = case
    options = {**options, "clamp": -1.0}
    grads = []
    for value in (0.0, eps):
        x = logits.clone().requires_grad_()
        rnnt_loss(x, y, T, U, reduction="sum", eps=value, **options).backward()
        grads.append(x.grad)
    assert (grads[0] - grads[1]).abs().max() <= eps * 1.0001


@SETTINGS
@given(case=batches())
def test_occupancies_are_probabilities(case):
    logits, y, T, U, options, _ = case
    _, occupancy = rnnt_loss(logits.float(), y, T, U, blank=options["blank"], return_occupancy=True)
    inside = torch.arange(y.shape[1]) < U[:, None]
    torch.testing.assert_close(occupancy.sum(2), inside.float(), rtol=0, atol=1e-4)
    assert (occupancy >= 0).all()


EDGES = [
    (2, 1, 0, 2), (1, 1, 0, 1), (3, 5, 0, 1), (1, 1, 9, 2), (300, 2, 1, 3), (1, 4000, 3, 5), (1, 4, 2000, 3),
    (2, 5, 3, 63), (2, 5, 3, 64), (2, 5, 3, 1000), (2, 3, 2, 50_000),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", EDGES)
def test_edges(shape, dtype):
    """Extreme shapes: against ours in float64, in place to the bit, packed."""
    B, T, U, V = shape
    g = torch.Generator().manual_seed(V)
    x = torch.randn(B, T, U + 1, V, generator=g).to(dtype)
    y = torch.randint(0, max(1, V - 1), (B, U), generator=g)
    T_b, U_b = torch.randint(1, T + 1, (B,), generator=g), torch.randint(0, U + 1, (B,), generator=g)
    T_b[0], U_b[0] = T, U

    def run(z, **options):
        z.requires_grad_()
        costs = rnnt_loss(z, y, T_b, U_b, reduction="none", **options)
        costs.sum().backward()
        return costs.detach(), z.grad

    costs, grad = run(x.clone())
    exact = run(x.double())
    np.testing.assert_allclose(costs, exact[0], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(grad.double(), exact[1], atol=TOLERANCE[dtype] / 2)
    again = run(x.clone(), inplace=True)
    assert torch.equal(again[0], costs) and torch.equal(again[1], grad)
    together = run(packed(x, T_b, U_b), layout="packed")
    torch.testing.assert_close(together[0], costs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(together[1], packed(grad, T_b, U_b), rtol=0, atol=TOLERANCE[dtype] / 2)


@pytest.mark.parametrize("scale", [0.0, 1e2, 1e3, 1e4, 1e6, 1e8, 1e12])
def test_logits_of_any_size(scale):
    """float32 logits carry scale * 6e-8 of rounding into no result: values are relative, gradients mostly 0 or 1."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(3, 9, 5, 40, generator=g) * scale
    y, T, U = torch.randint(0, 39, (3, 4), generator=g), torch.tensor([9, 4, 7]), torch.tensor([4, 2, 0])
    results = []
    for dtype in (torch.float32, torch.float64):
        z = x.to(dtype, copy=True).requires_grad_()
        costs = rnnt_loss(z, y, T, U, reduction="none")
        costs.sum().backward()
        results.append((costs.detach().double(), z.grad.double()))
    np.testing.assert_allclose(*(v[0] for v in results), rtol=1e-6)
    np.testing.assert_allclose(*(v[1] for v in results), atol=5e-5)
