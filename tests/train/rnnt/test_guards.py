"""Bad batches: the loss refuses some, with the row and its lengths in the message, and computes others as promised."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint
from stillhouse.train.rnnt.reference import rnnt_reference


def batch(B=3, T=6, U=4, V=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(B, T, U + 1, V, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, V - 1, (B, U), generator=g).int()
    return logits, targets, torch.tensor([6, 4, 5]).int(), torch.tensor([4, 2, 3]).int()


def joint_batch(**kw):
    logits, *rest = batch(**kw)
    B, T, U1, V = logits.shape
    g = torch.Generator().manual_seed(8)
    parts = [torch.randn(*s, generator=g) for s in ((B, T, 8), (B, U1, 8), (V, 8), (V,))]
    return parts, rest


def both(change, **kw):
    """Return calls of both entry points with a changed batch."""
    logits, y, T, U = batch(**kw)
    parts, _ = joint_batch(**kw)
    y, T, U = change(y.clone(), T.clone(), U.clone())
    return [lambda: rnnt_loss(logits, y, T, U), lambda: rnnt_loss_joint(*parts, y, T, U)]


def put(which, row, value):
    def change(*tensors):
        index = ("y", "T", "U").index(which)
        tensors[index][row] = value
        return tensors

    return change


@pytest.mark.parametrize("change, words", [
    (put("T", 1, 7), ["row 1", "logit length 7", "target length 2", "1..6 frames"]),
    (put("T", 2, 0), ["row 2", "logit length 0"]),
    (put("T", 2, -3), ["row 2", "logit length -3"]),
    (put("U", 0, 5), ["row 0", "target length 5", "logit length 6", "0..4 units"]),
    (put("U", 2, -1), ["row 2", "target length -1"]),
    (put("y", (1, 1), 4), ["row 1", "the blank", "position 1", "logit length 4", "target length 2"]),
    (put("y", (2, 0), 5), ["row 2", "target 5", "outside a vocabulary of 5"]),
    (put("y", (2, 2), -1), ["row 2", "target -1", "position 2"]),
])  # fmt: skip
def test_what_lies_outside_is_refused_by_name(change, words):
    for call in both(change):
        with pytest.raises(ValueError) as error:
            call()
        assert all(word in str(error.value) for word in words), str(error.value)


def test_padding_of_targets_may_hold_anything():
    for change in (put("y", (1, 2), 4), put("y", (1, 3), 999), put("y", (2, 3), -7)):
        for call in both(change):
            assert torch.isfinite(call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_integers_must_be_integers(dtype):
    for call in both(lambda y, T, U: (y, T.to(dtype), U)) + both(lambda y, T, U: (y.to(dtype), T, U)):
        with pytest.raises(TypeError, match="int32 or int64"):
            call()


def test_shapes_that_do_not_fit():
    logits, y, T, U = batch()
    parts, _ = joint_batch()
    with pytest.raises(ValueError, match="4 dimensions"):
        rnnt_loss(logits[0], y, T, U)
    with pytest.raises(ValueError, match="logits have 2 rows, targets 3"):
        rnnt_loss(logits[:2], y, T, U)
    with pytest.raises(ValueError, match="targets have 3 rows, logit_lengths 2"):
        rnnt_loss(logits, y, T[:2], U)
    with pytest.raises(ValueError, match=r"packed logits have 7 rows, but the lengths ask for .* = 62"):
        rnnt_loss(logits.reshape(-1, 5)[:7], y, T, U, layout="packed")
    with pytest.raises(ValueError, match="blank 5 is outside a vocabulary of 5"):
        rnnt_loss(logits, y, T, U, blank=5)
    with pytest.raises(ValueError, match="reduction 'average'"):
        rnnt_loss(logits, y, T, U, reduction="average")
    with pytest.raises(ValueError, match="fastemit_lambda -1"):
        rnnt_loss(logits, y, T, U, fastemit_lambda=-1)
    with pytest.raises(ValueError, match="layout 'rows'"):
        rnnt_loss(logits, y, T, U, layout="rows")
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64"):
        rnnt_loss(logits.long(), y, T, U)
    with pytest.raises(ValueError, match=r"\[B, T, H\], \[B, U\+1, H\], \[V, H\]"):
        rnnt_loss_joint(parts[0][:, :, :4], *parts[1:], y, T, U)
    with pytest.raises(ValueError, match="activation 'gelu'"):
        rnnt_loss_joint(*parts, y, T, U, activation="gelu")
    with pytest.raises(ValueError, match="combine 'cat'"):
        rnnt_loss_joint(*parts, y, T, U, combine="cat")


def test_longest_may_be_shorter_than_the_tensor():
    logits, y, _, _ = batch()
    T, U = torch.tensor([3, 2, 1]), torch.tensor([2, 1, 0])
    x = logits.clone().requires_grad_()
    loss = rnnt_loss(x, y, T, U, reduction="none")
    loss.sum().backward()
    expected = rnnt_reference(logits, y, T, U)
    np.testing.assert_allclose(loss.detach(), expected.costs, rtol=1e-5)
    np.testing.assert_allclose(x.grad, expected.gradient, atol=1e-6)


@pytest.mark.parametrize("T, U", [(1, 0), (1, 4), (2, 4), (6, 0)])
def test_smallest_lattices(T, U):
    logits, y, *_ = batch()
    lengths = torch.full((3,), T), torch.full((3,), U)
    x = logits.clone().requires_grad_()
    loss = rnnt_loss(x, y, *lengths, reduction="none")
    loss.sum().backward()
    expected = rnnt_reference(logits, y, *lengths)
    np.testing.assert_allclose(loss.detach(), expected.costs, rtol=1e-5)
    np.testing.assert_allclose(x.grad, expected.gradient, atol=1e-6)


def test_one_frame_no_unit_by_hand():
    logits = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3).requires_grad_()
    loss = rnnt_loss(logits, torch.zeros(1, 0).int(), torch.tensor([1]), torch.tensor([0]), blank=0)
    loss.backward()
    e = np.exp([0.0, 1.0, 2.0])
    assert float(loss.detach()) == pytest.approx(np.log(e.sum()), rel=1e-6)
    np.testing.assert_allclose(logits.grad.flatten(), e / e.sum() - [1, 0, 0], atol=1e-6)


def test_not_contiguous_and_expanded():
    logits, *rest = batch()
    expected = rnnt_loss(logits, *rest)
    strided = torch.stack([logits, logits], dim=-1)[..., 1]
    swapped = logits.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (strided, swapped):
        assert not x.is_contiguous()
        assert torch.equal(rnnt_loss(x, *rest), expected)
        with pytest.raises(ValueError, match="contiguous"):
            rnnt_loss(x, *rest, inplace=True)
    row = logits[:1].clone().requires_grad_()
    y, T, U = (v[:1].expand(3, *v.shape[1:]) for v in rest)
    rnnt_loss(row.expand(3, -1, -1, -1), y, T, U, reduction="sum").backward()
    alone = logits[:1].clone().requires_grad_()
    rnnt_loss(alone, y[:1], T[:1], U[:1], reduction="sum").backward()
    torch.testing.assert_close(row.grad, 3 * alone.grad)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("inplace", [False, True])
def test_padding_does_not_matter(poison, inplace):
    logits, y, T, U = batch()
    poisoned = logits.clone()
    for b in range(3):
        poisoned[b, T[b] :] = poison
        poisoned[b, :, U[b] + 1 :] = poison
    results = []
    for x in (logits.clone(), poisoned):
        x.requires_grad_()
        loss = rnnt_loss(x, y, T, U, inplace=inplace)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1][1, 4:].eq(0).all() and results[1][1][1, :, 3:].eq(0).all()


def test_padding_of_the_joint_does_not_matter():
    parts, (y, T, U) = joint_batch()
    expected = rnnt_loss_joint(*parts, y, T, U)
    for b in range(3):
        parts[0][b, T[b] :] = float("nan")
        parts[1][b, U[b] + 1 :] = float("nan")
    parts = [v.requires_grad_() for v in parts]
    loss = rnnt_loss_joint(*parts, y, T, U)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(torch.isfinite(v.grad).all() for v in parts)
    assert parts[0].grad[1, 4:].eq(0).all()


def test_large_logits():
    logits, *rest = batch()
    x = (logits * 1000).requires_grad_()
    loss = rnnt_loss(x, *rest, reduction="none")
    loss.sum().backward()
    expected = rnnt_reference((logits * 1000).numpy(), *rest)
    np.testing.assert_allclose(loss.detach(), expected.costs, rtol=1e-5)
    np.testing.assert_allclose(x.grad, expected.gradient, atol=2e-3)


def test_minus_infinity_closes_a_unit():
    logits, y, T, U = batch()
    y.clamp_(max=2)
    logits[..., 3] = -float("inf")
    x = logits.clone().requires_grad_()
    loss = rnnt_loss(x, y, T, U, reduction="none")
    loss.sum().backward()
    with np.errstate(invalid="ignore"):
        expected = rnnt_reference(logits.numpy(), y, T, U)
    np.testing.assert_allclose(loss.detach(), expected.costs, rtol=1e-5)
    np.testing.assert_allclose(x.grad, expected.gradient, atol=1e-6)
    assert x.grad[..., 3].eq(0).all()


def test_an_utterance_without_alignment_costs_infinity_and_teaches_nothing():
    logits, y, T, U = batch()
    logits[1, :, :, y[1, 0]] = -float("inf")
    x = logits.clone().requires_grad_()
    loss, occupancy = rnnt_loss(x, y, T, U, reduction="none", return_occupancy=True)
    loss[torch.isfinite(loss)].sum().backward()
    assert torch.isinf(loss).tolist() == [False, True, False]
    assert x.grad[1].eq(0).all() and occupancy[1].eq(0).all()
    alone = rnnt_loss(logits[:1], y[:1], T[:1], U[:1], reduction="none")
    assert torch.equal(alone, loss[:1].detach())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_is_named_and_stays_where_it_is(poison, dtype):
    logits, y, T, U = batch(dtype=dtype)
    clean = rnnt_loss(logits, y, T, U, reduction="none")
    logits[1, 2, 1, 0] = poison
    x = logits.clone().requires_grad_()
    with pytest.warns(RuntimeWarning, match=r"row 1 .*logit length 4, target length 2.* NaN"):
        loss = rnnt_loss(x, y, T, U, reduction="none")
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.equal(loss[[0, 2]].detach(), clean[[0, 2]])
    loss.sum().backward()
    assert torch.isfinite(x.grad[[0, 2]]).all()
    assert torch.isnan(x.grad[1]).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnnt_loss(logits[[0, 2]], y[[0, 2]], T[[0, 2]], U[[0, 2]])


@pytest.mark.parametrize("scale", [0.0, -2.5])
def test_grad_output_may_be_zero_or_negative(scale):
    logits, *rest = batch()
    grads = []
    for weight in (1.0, scale):
        x = logits.clone().requires_grad_()
        (rnnt_loss(x, *rest) * weight).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0] * scale)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "mean_volume", "mean_batch"])
def test_empty_batch(reduction):
    x = torch.zeros(0, 5, 4, 3, requires_grad=True)
    rest = torch.zeros(0, 3).int(), torch.zeros(0).int(), torch.zeros(0).int()
    loss = rnnt_loss(x, *rest, reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0 and x.grad.shape == x.shape
    parts = [torch.zeros(s, requires_grad=True) for s in ((0, 5, 4), (0, 4, 4), (3, 4), (3,))]
    rnnt_loss_joint(*parts, *rest, reduction=reduction).sum().backward()
    assert all(v.grad.eq(0).all() for v in parts)


def test_reductions():
    logits, y, T, U = batch()
    costs = rnnt_loss(logits, y, T, U, reduction="none")
    for reduction, expected in {
        "sum": costs.sum(), "mean": costs.sum() / 3, "mean_batch": costs.sum() / 3, "mean_volume": costs.sum() / 9
    }.items():  # fmt: skip
        torch.testing.assert_close(rnnt_loss(logits, y, T, U, reduction=reduction), expected)


def test_second_backward():
    logits, *rest = batch()
    x = logits.clone().requires_grad_()
    loss = rnnt_loss(x, *rest)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)

    x = logits.clone().requires_grad_()
    loss = rnnt_loss(x, *rest, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward of a loss in place"):
        loss.backward()


def test_inplace_is_seen_by_autograd():
    logits, *rest = batch()
    leaf = logits.clone().requires_grad_()
    x = leaf * 1.0
    squares = (x * x).sum()  # needs x as it was
    loss = rnnt_loss(x, *rest, inplace=True)
    version = x._version
    loss.backward()
    assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_no_double_backward():
    logits, *rest = batch(dtype=torch.float64)
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(rnnt_loss(x, *rest), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_batch_is_its_utterances_one_by_one(layout):
    logits, y, T, U = batch()
    x = logits.clone().requires_grad_()
    given = x
    if layout == "packed":
        given = torch.cat([x[b, : T[b], : U[b] + 1].reshape(-1, 5) for b in range(3)])
    costs = rnnt_loss(given, y, T, U, reduction="none", layout=layout)
    costs.sum().backward()
    for b in range(3):
        one = logits[b : b + 1, : T[b], : U[b] + 1].clone().requires_grad_()
        cost = rnnt_loss(one, y[b : b + 1, : U[b]], T[b : b + 1], U[b : b + 1], reduction="sum")
        cost.backward()
        torch.testing.assert_close(costs[b], cost, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad[b, : T[b], : U[b] + 1], one.grad[0], rtol=1e-5, atol=1e-6)


def test_under_autocast():
    parts, rest = joint_batch()
    expected = rnnt_loss_joint(*parts, *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rnnt_loss_joint(*parts, *rest), expected)
        e = parts[0].bfloat16().requires_grad_()
        loss = rnnt_loss_joint(e, *parts[1:], *rest)
        logits = torch.tanh(parts[0][:, :, None] + parts[1][:, None]) @ parts[2].t()
        assert logits.dtype == torch.bfloat16
        half = rnnt_loss(logits, *rest)
    loss.backward()
    assert loss.dtype == torch.float32 and e.grad.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, rnnt_loss(logits.float(), *rest))


def test_log_probabilities_given():
    logits, y, T, U = batch(dtype=torch.float64)
    x = logits.log_softmax(-1).requires_grad_()
    loss = rnnt_loss(x, y, T, U, reduction="sum", fused_log_softmax=False)
    loss.backward()
    expected = rnnt_reference(x.detach(), y, T, U, fused_log_softmax=False)
    np.testing.assert_allclose(loss.detach(), expected.costs.sum(), rtol=1e-12)
    np.testing.assert_allclose(x.grad, expected.gradient, atol=1e-12)


def test_mixed_integer_types_and_negative_blank():
    logits, y, T, U = batch()
    expected = rnnt_loss(logits, y, T, U)
    assert torch.equal(rnnt_loss(logits, y.long(), T, U.long(), blank=4), expected)


@pytest.mark.slow
def test_more_logits_than_32_bits_count():
    T, U, V = 2100, 1, 1 << 19
    x = torch.zeros(1, T, U + 1, V, dtype=torch.bfloat16)  # 2.2e9 logits
    x[0, T - 1, U, 3] = 5.0
    rest = torch.zeros(1, 1).int(), torch.tensor([T]), torch.tensor([U])
    x.requires_grad_()
    loss = rnnt_loss(x, *rest, blank=3, inplace=True)
    loss.backward()
    log_v = np.log(V)
    last = np.log(V - 1 + np.exp(5.0))
    expected = -(np.log(T) - (T - 1 + 1) * log_v - last + 5.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(x.grad[0, T - 1, U, 3]) == pytest.approx(np.exp(5.0 - last) - 1, rel=1e-2)
