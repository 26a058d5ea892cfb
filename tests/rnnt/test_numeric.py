"""The kernels' own arithmetic against numpy in float64."""

from __future__ import annotations

import numpy as np
import torch

from stillhouse.train.rnnt import numeric
from stillhouse.train.rnnt.numeric import kernel
from stillhouse.train.rnnt.rows import load, store


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
