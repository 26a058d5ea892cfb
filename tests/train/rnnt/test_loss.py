"""rnnt_loss against the float64 reference, torchaudio and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchaudio

from stillhouse.train.rnnt import rnnt_loss
from stillhouse.train.rnnt.reference import rnnt_reference


def make_batch(seed=0, B=4, T=11, U=6, V=9, blank=-1, dtype=torch.float32, full=False):
    """A ragged batch whose longest utterance fills the tensor; full: what torchaudio asks for, too."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, U + 1, V, generator=g, dtype=torch.float64).mul_(2).to(dtype)
    units = [v for v in range(V) if v != blank % V]
    targets = torch.tensor(units)[torch.randint(0, V - 1, (B, U), generator=g)].int()
    T_b = torch.randint(1, T + 1, (B,), generator=g).int()
    U_b = torch.randint(0, U + 1, (B,), generator=g).int()
    T_b[0], U_b[-1] = T, U
    if full:
        U_b.clamp_(min=1)
    return logits, targets, T_b, U_b


def pack(logits, T, U):
    return torch.cat([logits[b, :t, : u + 1].reshape(-1, logits.shape[-1]) for b, (t, u) in enumerate(zip(T, U))])


def close(a, b, tolerance=1e-5):
    a, b = (np.asarray(v.detach().double() if torch.is_tensor(v) else v) for v in (a, b))
    assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(b).max(initial=0))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("blank", [-1, 0])
@pytest.mark.parametrize("clamp", [-1, 0.05])
def test_values_and_gradients_are_torchaudios(seed, blank, clamp):
    logits, *rest = make_batch(seed, blank=blank, full=True)
    results = []
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0])
    for loss in (torchaudio.functional.rnnt_loss, rnnt_loss):
        x = logits.clone().requires_grad_()
        costs = loss(x, *rest, blank, clamp, "none")
        (costs * weight).sum().backward()
        results.append((costs.detach(), x.grad))
    close(results[1][0], results[0][0])
    close(results[1][1], results[0][1])


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)
])  # fmt: skip
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_dtype_and_layout_agrees_with_the_reference(dtype, tolerance, layout, inplace):
    logits, y, T, U = make_batch(3, dtype=dtype)
    expected = rnnt_reference(logits.double().numpy(), y, T, U, fastemit_lambda=0.1, delay_penalty=0.2)
    gradient = torch.from_numpy(expected.gradient)
    x = logits.clone()
    if layout == "packed":
        x, gradient = pack(x, T, U), pack(gradient, T, U)
    x.requires_grad_()
    loss, occupancy = rnnt_loss(
        x, y, T, U, reduction="sum", fastemit_lambda=0.1, delay_penalty=0.2, layout=layout, inplace=inplace,
        return_occupancy=True,
    )  # fmt: skip
    loss.backward()
    close(loss, expected.costs.sum(), min(tolerance, 1e-5))
    close(x.grad, gradient, tolerance)
    close(occupancy, expected.occupancy, 1e-6)
    assert not occupancy.requires_grad
    close(occupancy.sum(dim=2), (torch.arange(6) < U[:, None]).float(), 1e-5)
    assert (x.grad.data_ptr() == x.data_ptr()) == inplace


def test_gradcheck():
    logits, *rest = make_batch(1, B=2, T=4, U=3, V=4, dtype=torch.float64)
    x = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rnnt_loss(x, *rest, reduction="none", delay_penalty=0.3), (x,))
