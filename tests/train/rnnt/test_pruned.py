"""The pruned mode: the simple joint, the choice of the band, and the loss on a band."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stillhouse.train.rnnt import prune_ranges, rnnt_loss, rnnt_loss_joint, rnnt_loss_simple


def make(seed=0, B=3, T=8, U=5, V=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    am, lm = (torch.randn(B, n, V, generator=g, dtype=dtype).mul(2).requires_grad_() for n in (T, U + 1))
    targets = torch.randint(0, V - 1, (B, U), generator=g)
    T_b, U_b = torch.randint(3, T + 1, (B,), generator=g), torch.randint(0, U + 1, (B,), generator=g)
    T_b[0], U_b[-1] = T, U
    return am, lm, (targets, T_b, U_b)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seed, fastemit", [(0, 0.0), (1, 0.2), (2, 1.5)])
def test_simple_joint_is_the_loss_of_the_sum(dtype, tolerance, seed, fastemit):
    am, lm, rest = make(seed, dtype=dtype)
    weight = torch.tensor([1.0, -0.5, 2.0], dtype=dtype)
    options = dict(reduction="none", delay_penalty=0.1, fastemit_lambda=fastemit)
    costs, gamma = rnnt_loss_simple(am, lm, *rest, **options)
    found = torch.autograd.grad(costs @ weight, (am, lm))
    full, occupancy = rnnt_loss(am[:, :, None] + lm[:, None], *rest, return_occupancy=True, **options)
    expected = torch.autograd.grad(full @ weight, (am, lm))
    torch.testing.assert_close(costs, full, rtol=tolerance, atol=tolerance)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 10)
    # Blank or label leave a cell. Summed over units, labels and one blank leave each frame.
    T, U = rest[1:]
    for b in range(3):
        inside = gamma[b, : T[b], : U[b] + 1]
        np.testing.assert_allclose(inside.sum(1).detach(), 1 + occupancy[b, :, : T[b]].sum(0), rtol=1e-4)
        assert gamma[b, T[b] :].eq(0).all() and gamma[b, :, U[b] + 1 :].eq(0).all()


def test_padding_of_the_simple_joint_does_not_matter():
    am, lm, (y, T, U) = make(1)
    expected = rnnt_loss_simple(am, lm, y, T, U)[0]
    am, lm = am.detach().clone(), lm.detach().clone()
    for b in range(3):
        am[b, T[b] :] = float("nan")
        lm[b, U[b] + 1 :] = float("nan")
    assert torch.equal(rnnt_loss_simple(am, lm, y, T, U)[0], expected)


def legal_bands(T, U, width):
    starts = range(max(1, U + 2 - width))
    for band in itertools.product(starts, repeat=T):
        steps = np.diff(band)
        if band[0] == 0 and band[-1] == starts[-1] and (steps >= 0).all() and (steps < width).all():
            yield band


@pytest.mark.parametrize("T, U, width", [(5, 4, 2), (4, 5, 3), (6, 3, 2), (3, 5, 3), (3, 2, 5), (1, 2, 3), (4, 0, 1)])
def test_the_band_is_the_best_of_all(T, U, width):
    gamma = torch.rand(2, T + 1, U + 2, generator=torch.Generator().manual_seed(T), dtype=torch.float64)
    lengths = torch.tensor([T, T]), torch.tensor([U, U])
    ranges = prune_ranges(gamma, *lengths, width)
    assert ranges.shape == (2, T + 1, width) and (ranges.diff(dim=2) == 1).all()

    def score(b, band):
        return sum(float(gamma[b, t, s : min(s + width, U + 1)].sum()) for t, s in enumerate(band))

    for b in range(2):
        band = ranges[b, :T, 0].tolist()
        assert tuple(band) in set(legal_bands(T, U, width))
        assert score(b, band) == pytest.approx(max(score(b, other) for other in legal_bands(T, U, width)))


def test_a_band_too_narrow_is_refused_with_the_width_that_would_do():
    gamma = torch.rand(2, 4, 8)
    with pytest.raises(ValueError, match=r"row 1 .*logit length 3, target length 7.* Expected 4 or more"):
        prune_ranges(gamma, torch.tensor([4, 3]), torch.tensor([4, 7]), 3)


@pytest.mark.parametrize("band, words", [
    ([1, 1, 2, 2], "row 0"), ([0, 0, 0, 0], "reach unit 4"), ([0, 2, 1, 2], "row 0"), ([0, 0, 3, 3], "row 0")
])  # fmt: skip
def test_bands_that_hold_no_alignment_are_refused(band, words):
    ranges = torch.tensor(band)[None, :, None] + torch.arange(3)
    args = torch.zeros(1, 4).int(), torch.tensor([4]), torch.tensor([4])
    with pytest.raises(ValueError, match=words):
        rnnt_loss(torch.zeros(1, 4, 3, 5), *args, ranges=ranges)


def test_the_loss_on_a_band_is_the_loss_with_all_else_forbidden():
    am, lm, (y, T, U) = make(3)
    width = 3
    ranges = prune_ranges(rnnt_loss_simple(am, lm, y, T, U)[1], T, U, width)
    full = (am[:, :, None] * lm[:, None]).detach()
    # Arcs into and out of a cell outside the band cost 1e9, which closes it.
    inside = (ranges[..., None] == torch.arange(lm.shape[1])).any(2)
    closed = full.log_softmax(-1).masked_fill(~inside[..., None], -1e9).requires_grad_()
    expected, expected_occupancy = rnnt_loss(
        closed, y, T, U, reduction="none", fused_log_softmax=False, return_occupancy=True
    )
    index = ranges.clamp(max=lm.shape[1] - 1)[..., None].expand(-1, -1, -1, full.shape[3])
    x = full.gather(2, index).requires_grad_()
    costs, occupancy = rnnt_loss(x, y, T, U, reduction="none", ranges=ranges, return_occupancy=True)
    torch.testing.assert_close(costs, expected)
    torch.testing.assert_close(occupancy, expected_occupancy)
    assert torch.autograd.gradcheck(lambda x: rnnt_loss(x, y, T, U, reduction="none", ranges=ranges), (x,))


@pytest.mark.parametrize("width", [3, 6, 9])
def test_the_joint_on_a_band(width):
    am, lm, (y, T, U) = make(4)
    ranges = prune_ranges(rnnt_loss_simple(am, lm, y, T, U)[1], T, U, width)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 7, generator=g, dtype=torch.float64).requires_grad_()
    rows = ranges.clamp(max=lm.shape[1] - 1)[..., None].expand(-1, -1, -1, 7)
    banded = lm[:, None].expand(-1, am.shape[1], -1, -1).gather(2, rows)
    logits = torch.tanh(am[:, :, None] + banded) @ weight.t()
    expected = rnnt_loss(logits, y, T, U, reduction="sum", ranges=ranges)
    found = rnnt_loss_joint(am, lm, weight, None, y, T, U, reduction="sum", ranges=ranges, eps=0)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(v, (am, lm, weight)) for v in (found, expected))):
        torch.testing.assert_close(a, b)
    if width > U.max():  # nothing is pruned
        torch.testing.assert_close(found, rnnt_loss_joint(am, lm, weight, None, y, T, U, reduction="sum"))
