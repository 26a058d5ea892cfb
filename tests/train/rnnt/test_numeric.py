"""The kernels' own arithmetic against numpy in float64."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.train.rnnt import rnnt_loss
from stillhouse.train.rnnt.cpu import numeric
from stillhouse.train.rnnt.cpu.numeric import clear_rows, kernel
from stillhouse.train.rnnt.cpu.rows import load, store
from stillhouse.train.rnnt.cpu.vector import LOG2E, combine_tanh, scale_powers, sum_powers


def test_the_cache_watches_every_file_with_kernels():
    files = Path(numeric.__file__).parent.glob("*.py")
    holding = {f.stem for f in files if re.search(r"^@(kernel|inlined_kernel|intrinsic|overload)", f.read_text(), re.M)}
    assert holding == set(numeric.KERNEL_SOURCES)


@kernel
def each(function_number, x, out):
    for i in range(x.size):
        if function_number == 0:
            out[i] = numeric.exp32(x[i])
        elif function_number == 1:
            out[i] = numeric.log1p_unit32(x[i])
        else:
            out[i] = numeric.log32(x[i])


def apply(number, x):
    out = np.empty(x.size)
    each(number, np.asarray(x, np.float32), out)
    return out


def test_exp():
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    assert np.abs(apply(0, x) / np.exp(x.astype(np.float64)) - 1).max() < 2.5e-7


def test_exp_at_the_ends():
    found = apply(0, np.array([-np.inf, -1e30, -88, 0, 88.3, 1e30, np.inf, np.nan], np.float32))
    assert found[:3].tolist() == [0, 0, 0] and abs(found[3] - 1) < 2e-7
    assert (found[4:7] > 1e38).all() and np.isnan(found[7])


def test_log1p():
    x = np.linspace(1e-6, 1, 100_001, dtype=np.float32)
    assert np.abs(apply(1, x) / np.log1p(x.astype(np.float64)) - 1).max() < 2.5e-7


def test_log():
    x = np.exp(np.linspace(-27, 57, 100_001)).astype(np.float32)
    assert np.abs(apply(2, x) - np.log(x.astype(np.float64))).max() < 1e-7


@kernel
def round_trip(row, values, loaded):
    for i in range(values.size):
        store(row, i, values[i])
        loaded[i] = load(row, i)


def test_half_precision_rounds_as_torch_does():
    values = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, 1e-8, 65504.0, 1e30, float("inf"), 1 + 2**-8])])
    for dtype, kind in ((torch.bfloat16, np.uint16), (torch.float16, np.int16)):
        row, loaded = np.zeros(len(values), kind), np.zeros(len(values), np.float32)
        round_trip(row, values.numpy(), loaded)
        np.testing.assert_array_equal(loaded, values.to(dtype).float().numpy())
        round_trip(row, np.full(len(values), np.nan, np.float32), loaded)
        assert np.isnan(loaded).all()


@kernel
def one_row(rows, i, base, out, j, weight):
    scale_powers(rows, i, out, j, base, weight)
    return sum_powers(rows, i, base)


@kernel
def cleared(rows, start, stop):
    clear_rows(rows, start, stop)


ROW_KINDS = {torch.float32: (np.float32, 4e-7), torch.float16: (np.int16, 5e-4), torch.bfloat16: (np.uint16, 4e-3)}


@pytest.mark.parametrize("dtype", ROW_KINDS)
def test_a_row_of_any_length_anywhere(dtype):
    """Sums and softmaxes of rows of every length, at every place of a cache line; the rows beside stay as they are."""
    kind, tolerance = ROW_KINDS[dtype]
    for V in [*range(1, 70), 79, 95, 127, 128, 129, 200, 255]:
        given = torch.randn(5, V, generator=torch.Generator().manual_seed(V)).mul(3).to(dtype)
        bits = (given if dtype == torch.float32 else given.view(torch.int16)).numpy().view(kind)
        for i in range(5):
            logits = given[i].double()
            base = np.float32(float(logits.logsumexp(0)) * LOG2E)
            wanted = torch.exp(logits - float(base) / LOG2E)
            for out, j, inplace in ((np.full_like(bits, 7), 4 - i, False), (bits.copy(), i, True)):
                before = out.copy()
                total = one_row(out if inplace else bits, i, base, out, j, np.float32(0.5))
                if not inplace:
                    assert total == pytest.approx(float(wanted.sum()), rel=5e-7)
                found = torch.from_numpy(out[j].view(np.int16 if kind != np.float32 else kind)).view(dtype).double()
                np.testing.assert_allclose(found, wanted * 0.5, rtol=tolerance, atol=1e-7)
                before[j] = out[j]
                np.testing.assert_array_equal(out, before)


def test_powers_at_the_ends():
    row = np.array([[-np.inf, -1e30, -89, 0.0, np.nan, -3e38, 1.0]], np.float32)
    out = np.empty_like(row)
    assert np.isnan(one_row(row, 0, np.float32(0), out, 0, np.float32(1)))
    assert out[0, :3].tolist() == [0, 0, 0] and np.isnan(out[0, 4]) and out[0, 5] == 0
    np.testing.assert_allclose(out[0, [3, 6]], [1, np.e], rtol=4e-7)
    # A sum that is too large for a float32 cannot be confused with a good one.
    large = np.full((1, 40), 1e30, np.float32)
    assert one_row(large, 0, np.float32(0), np.empty_like(large), 0, np.float32(0)) > 1e38


def test_rows_are_cleared():
    for kind in (np.float32, np.float64, np.int16):
        rows = np.ones((6, 5), kind)
        cleared(rows, 2, 4)
        cleared(rows, 5, 5)
        assert rows.sum(1).tolist() == [5, 5, 0, 0, 5, 5]


@pytest.mark.parametrize("V", [20, 28, 100, 500])
def test_results_do_not_depend_on_where_the_logits_lie(V: int) -> None:
    generator = torch.Generator().manual_seed(V)
    values = torch.randn(2, 20, 7, V, generator=generator)
    targets = torch.randint(1, V, (2, 6), generator=generator).int()
    frames, units = torch.tensor([20, 17]).int(), torch.tensor([6, 4]).int()
    results = []
    for offset in (0, 1, 5, 12):  # elements, from the start of a cache line
        logits = torch.empty(values.numel() + 16)[offset : offset + values.numel()].view(values.shape).copy_(values)
        leaf = logits.requires_grad_()
        loss = rnnt_loss(leaf, targets, frames, units, blank=0, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss.detach(), gradient))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@kernel
def one_tanh(left, i, right, j, out, k, multiply):
    combine_tanh(left, i, right, j, out, k, multiply)


@pytest.mark.parametrize("multiply", [False, True])
def test_tanh_of_rows_of_any_length(multiply):
    """Against numpy in float64, all of a row's elements and none of its neighbours'."""
    rng = np.random.default_rng(0)
    for H in [*range(1, 50), 63, 64, 65, 512]:
        left, right = (rng.normal(0, 4, (3, H)).astype(np.float32) for _ in range(2))
        out = np.full((3, H), 7, np.float32)
        one_tanh(left, 2, right, 0, out, 1, multiply)
        a, b = left[2].astype(np.float64), right[0].astype(np.float64)
        assert np.abs(out[1] - np.tanh(a * b if multiply else a + b)).max() < 2.5e-7
        assert (out[[0, 2]] == 7).all()


def test_tanh_at_the_ends():
    ends = np.array([[0, 1e-7, 45, -45, 1e30, -1e30, np.inf, -np.inf, np.nan] * 3], np.float32)
    out = np.empty_like(ends)
    one_tanh(ends, 0, np.zeros_like(ends), 0, out, 0, False)
    np.testing.assert_allclose(out[0, :8], [0, 0, 1, -1, 1, -1, 1, -1], atol=2.5e-7)
    assert np.isnan(out[0, 8::9]).all() and np.isfinite(np.delete(out[0], [8, 17, 26])).all()
