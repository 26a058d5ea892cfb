"""rnnt_loss_joint against joint + rnnt_loss, tile by tile, and its promises: eps, memory, bits."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint
from stillhouse.train.rnnt.cpu import joint


def make_parts(seed=0, B=4, T=11, U=6, V=9, H=7, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((B, T, H), (B, U + 1, H), (V, H), (V,))
    ]
    targets = torch.randint(0, V - 1, (B, U), generator=g).int()
    T_b, U_b = torch.randint(1, T + 1, (B,), generator=g), torch.randint(0, U + 1, (B,), generator=g)
    T_b[0], U_b[-1] = T, U
    return parts, (targets, T_b.int(), U_b.int())


def logits_of(parts, activation="tanh", combine="add"):
    e, p, w, c = parts
    hidden = e[:, :, None] + p[:, None] if combine == "add" else e[:, :, None] * p[:, None]
    return getattr(torch, activation)(hidden) @ w.t() + c


def close(a, b, tolerance):
    assert (a - b).detach().abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("combine", ["add", "mul"])
@pytest.mark.parametrize("tile", [3, 1000])
def test_it_is_joint_and_loss(dtype, tolerance, activation, combine, tile, monkeypatch):
    monkeypatch.setattr(joint, "tile_rows", lambda vocabulary: tile)
    parts, rest = make_parts(1, dtype=dtype)
    options = dict(fastemit_lambda=0.1, delay_penalty=0.2, clamp=0.3, reduction="none", return_occupancy=True)
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=dtype)

    costs, occupancy = rnnt_loss(logits_of(parts, activation, combine), *rest, **options)
    expected = torch.autograd.grad((costs * weight).sum(), parts)
    fused, fused_occupancy = rnnt_loss_joint(*parts, *rest, **options, eps=0, activation=activation, combine=combine)
    found = torch.autograd.grad((fused * weight).sum(), parts)
    close(fused, costs, tolerance)
    close(fused_occupancy, occupancy, 1e-6)
    for a, b in zip(found, expected):
        close(a, b, tolerance)


def peak_growth(step) -> int:
    """Return the bytes by which the peak resident set exceeds what was resident before."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to reset the peak in")
def test_memory_does_not_grow_with_the_logits():
    growths = {}
    for V in (500, 8000):
        parts, (targets, *_) = make_parts(B=2, T=100, U=40, V=V, H=16)
        lengths = torch.tensor([100, 100]), torch.tensor([40, 40])
        rnnt_loss_joint(*parts, targets, *lengths).backward()
        growths[V] = peak_growth(lambda p=parts, t=targets, n=lengths: rnnt_loss_joint(*p, t, *n).backward())
    logits = 2 * 100 * 41 * 8000 * 4
    assert growths[8000] < logits / 10
    assert growths[8000] - growths[500] < 40 * 2**20, growths  # gradients of the weight, one each thread, and tiles


def test_eps_skips_cells_and_changes_the_gradient_by_about_eps():
    parts, rest = make_parts(3, T=30, U=10)
    grads = [
        torch.autograd.grad(rnnt_loss_joint(*parts, *rest, reduction="sum", eps=eps), parts) for eps in (0.0, 1e-3, 2.0)
    ]
    cells = sum(int(t) * (int(u) + 1) for t, u in zip(*rest[1:]))
    for exact, near, none in zip(*grads):
        assert 0 < (exact - near).abs().max() <= 1e-3 * cells
        assert none.eq(0).all()
