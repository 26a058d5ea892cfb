"""One row of logits at a time: logsumexp in one pass, and the gradient of a row, for each dtype.

Half precision is the integers of its bits: uint16 is bfloat16, int16 is IEEE half. The arithmetic is in float32, and in
float64 for float64 rows.
Guarantees: a row is read once and written once.
Try: `pytest tests/train/rnnt/test_numeric.py tests/train/rnnt/test_properties.py`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from .numeric import (
    bfloat_to_float,
    clear_rows,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    inlined_kernel,
    kernel,
    log32,
    sum_add,
)
from .vector import LOG2E, scale_powers, sum_powers

f32 = np.float32
# A sum of exponentials outside these bounds has lost digits or overflowed. It is computed again around the maximum.
SUM_LOW, SUM_HIGH = 1e-12, 1e25
FAR = 1e6  # For larger logits a float32 base loses more than the fraction of a power of two: they go one at a time.
LN2, LN2E = 0.6931471805599453, 1 / LOG2E


def load(row, i):
    """Return row[i] in the type that is computed in."""
    return row[i]


def store(row, i, value):
    """Set row[i] to the value, rounded to the row's type."""
    row[i] = value


def computed(row, value):
    """Return the value in the type that rows like this one are computed in."""
    return value


@overload(computed, inline="never")
def _computed(row, value):
    if row.dtype == types.float64:
        return lambda row, value: np.float64(value)
    return lambda row, value: f32(value)


@overload(load, inline="never")
def _load(row, i):
    if row.dtype == types.uint16:
        return lambda row, i: bfloat_to_float(row[i])
    if row.dtype == types.int16:
        return lambda row, i: half_to_float(row[i])
    return lambda row, i: row[i]


@overload(store, inline="never")
def _store(row, i, value):
    if row.dtype == types.uint16:

        def impl(row, i, value):
            row[i] = float_to_bfloat(f32(value))

    elif row.dtype == types.int16:

        def impl(row, i, value):
            row[i] = float_to_half(f32(value))

    else:

        def impl(row, i, value):
            row[i] = value

    return impl


def sum_exp(rows, i, reference):
    """Return the sum of exp(row i - reference), in the type that is computed in. The reference is from base_of."""
    return np.exp(rows[i] - reference).sum()


@overload(sum_exp, inline="never")
def _sum_exp(rows, i, reference):
    if rows.dtype != types.float64:
        return lambda rows, i, reference: sum_powers(rows, i, reference)

    def impl(rows, i, reference):
        total, row = 0.0, rows[i]
        for v in range(row.size):
            total = sum_add(total, math.exp(row[v] - reference))
        return total

    return impl


def base_of(rows, value):
    """Return a value of the logits as the loops over rows subtract it: those of float32 count in powers of two."""
    return value


@overload(base_of, inline="never")
def _base_of(rows, value):
    if rows.dtype == types.float64:
        return lambda rows, value: value
    return lambda rows, value: f32(np.float64(value) * LOG2E)


def log_of_sum(rows, reference, total):
    """Return log(exp(reference) * total) as float64, with float32's digits unless the rows are float64."""
    return reference + np.log(total)


@overload(log_of_sum, inline="never")
def _log_of_sum(rows, reference, total):
    if rows.dtype == types.float64:
        return lambda rows, reference, total: reference + math.log(total)
    return lambda rows, reference, total: np.float64(reference) * LN2E + log32(total)


@kernel
def log_sum_exp_safe(rows, i):
    """Return logsumexp of row i in float64, around its maximum, in two passes.

    It is -inf if all elements are, and NaN for NaN and +inf.
    """
    row = rows[i]
    high = load(row, 0)
    for v in range(1, row.size):
        value = load(row, v)
        high = value if not (value <= high) else high
    if not (-np.inf < high < np.inf):
        return np.float64(np.nan) if high != -np.inf else -np.inf
    if -FAR < high < FAR:
        base = base_of(rows, high)
        around = sum_exp(rows, i, base)
        return log_of_sum(rows, base, around) if around > 0 else np.float64(np.nan)
    total = 0.0
    for v in range(row.size):
        total += math.exp(np.float64(load(row, v)) - high)
    return np.float64(high) + math.log(total)


@kernel
def log_sum_exps(rows, reference, sums, out):
    """Write logsumexp of each row, float64, to out [R], in one pass over the rows.

    reference [R], as base_of returns it, holds guesses and then the results. Good guesses are results of neighbours.
    sums [R] is memory to work in. All sums are before all logarithms, so neither waits for the other.
    """
    count = rows.shape[0]
    for i in range(count):
        sums[i] = sum_exp(rows, i, reference[i])
    worst = False
    for i in range(count):
        out[i] = log_of_sum(rows, reference[i], sums[i])
        worst |= not (SUM_LOW <= sums[i] <= SUM_HIGH)
    if worst:
        for i in range(count):
            if not (SUM_LOW <= sums[i] <= SUM_HIGH):
                out[i] = log_sum_exp_safe(rows, i)
    for i in range(count):
        reference[i] = base_of(rows, out[i] if -1e30 < out[i] < 1e30 else 0.0)


def scaled_softmax(source, i, target, j, lse, weight):
    """Set row j of target to softmax of row i of source * weight, both float64. The two rows may be the same."""
    target[j] = np.exp(source[i] - lse) * weight


@overload(scaled_softmax, inline="never")
def _scaled_softmax(source, i, target, j, lse, weight):
    if source.dtype == types.float64:

        def impl(source, i, target, j, lse, weight):
            row, result = source[i], target[j]
            for v in range(row.size):
                result[v] = math.exp(row[v] - lse) * weight

    else:

        def impl(source, i, target, j, lse, weight):
            if -FAR < lse < FAR:
                base = base_of(source, lse)
                lost = (np.float64(lse) * LOG2E - np.float64(base)) * LN2  # by rounding the base
                scale_powers(source, i, target, j, base, f32(weight * (1 - lost * (1 - 0.5 * lost))))
            else:
                row, result = source[i], target[j]
                for v in range(row.size):
                    store(result, v, f32(math.exp(np.float64(load(row, v)) - lse) * weight))

    return impl


@kernel
def clamp_scale_(row, limit, scale):
    """Set row to clip(row, -limit, limit) * scale."""
    for i in range(row.size):
        value = load(row, i)
        value = limit if value > limit else value
        value = -limit if value < -limit else value
        store(row, i, value * scale)


@inlined_kernel
def gradient_row(source, i, target, j, lse, occ_blank, occ_label, blank, label, scale, clamp, fused):
    """Write one cell's gradient, of row i of source, to row j of target, which may be the same row.

    occ_blank and occ_label are the arcs' occupancies, scale is the output's gradient. With label < 0, no label leaves
    the cell.
    """
    factor = scale if clamp <= 0 else 1.0
    weight = (occ_blank + occ_label) * factor
    row = target[j]
    at_blank, at_label = computed(row, 0.0), computed(row, 0.0)
    if not fused or weight == 0:
        clear_rows(target, j, j + 1)
    elif row.itemsize < 4:  # Blank and label are rounded once, after the subtraction below.
        at_blank = computed(row, math.exp(load(source[i], blank) - lse) * weight)
        at_label = computed(row, math.exp(load(source[i], max(label, 0)) - lse) * weight)
        scaled_softmax(source, i, target, j, lse, weight)
    else:
        scaled_softmax(source, i, target, j, lse, weight)
        at_blank, at_label = load(row, blank), load(row, max(label, 0))
    store(row, blank, at_blank - computed(row, occ_blank * factor))
    if label >= 0:
        store(row, label, at_label - computed(row, occ_label * factor))
    if clamp > 0:
        clamp_scale_(row, computed(row, clamp), computed(row, scale))
