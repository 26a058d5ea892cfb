"""One row of logits at a time: logsumexp in one pass, and the gradient of a row, for every dtype.

Half precision comes in as the integers of its bits: uint16 is bfloat16, int16 is IEEE half. All arithmetic is in
float32 (in float64 for float64 rows). Invariant: a row is read once and written once.
Run: pytest tests/rnnt/test_rows.py
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from .numeric import bfloat_to_float, exp32, float_to_bfloat, float_to_half, half_to_float, kernel, log32, sum_add

f32 = np.float32
# a sum of exponentials outside these bounds has lost digits or overflowed and is taken again around the maximum
SUM_LOW, SUM_HIGH = 1e-12, 1e25


def load(row, i):
    """row[i] as the type that is computed in."""
    return row[i]


def store(row, i, value):
    """row[i] = value, rounded to the row's type."""
    row[i] = value


def computed(row, value):
    """value as the type that rows like this one are computed in."""
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


def exp_like(x):
    """exp in the type of x: fast for float32, exact for float64."""
    return np.exp(x)


@overload(exp_like, inline="never")
def _exp_like(x):
    if x == types.float32:
        return lambda x: exp32(x)
    return lambda x: math.exp(x)


@kernel
def sum_exp(row, reference):
    """Sum of exp(row - reference); reference has the type that is computed in.

    The bulk starts on a cache line: vectors that straddle two make this loop, which only reads, half as fast.
    """
    total, zero = computed(row, 0.0), computed(row, 0.0)
    size = row.size
    if size < 32:
        for i in range(size):
            total = sum_add(total, exp_like(load(row, i) - reference))
        return total
    head = (-(row.ctypes.data // row.itemsize)) % 16
    whole = (size - head) // 16 * 16
    tail = size - head - whole
    if head:  # one vector whose last elements are the bulk's
        for i in range(16):
            value = exp_like(load(row, i) - reference)
            total = sum_add(total, value if i < head else zero)
    body = row[head : head + whole]
    for i in range(body.size):
        total = sum_add(total, exp_like(load(body, i) - reference))
    if tail:  # one vector whose first elements are the bulk's
        rest = row[size - 16 :]
        for i in range(16):
            value = exp_like(load(rest, i) - reference)
            total = sum_add(total, value if i >= 16 - tail else zero)
    return total


@kernel
def row_max(row):
    high = load(row, 0)
    for i in range(1, row.size):
        value = load(row, i)
        high = value if not (value <= high) else high  # NaN wins
    return high


@kernel
def log_sum_exp_safe(row):
    """logsumexp of a row in float64, around its maximum: two passes. -inf when all are, NaN for NaN and +inf."""
    high = row_max(row)
    if not (-np.inf < high < np.inf):
        return np.float64(np.nan) if high != -np.inf else -np.inf
    return np.float64(high) + math.log(np.float64(sum_exp(row, high)))


def log_of_sum(row, total):
    """log of a sum over a row like this one, as float64; to float32's digits unless the row is float64."""
    return np.log(total)


@overload(log_of_sum, inline="never")
def _log_of_sum(row, total):
    if row.dtype == types.float64:
        return lambda row, total: math.log(total)
    return lambda row, total: log32(total)


@kernel
def log_sum_exps(rows, reference, sums, out):
    """logsumexp of every row, float64, into out [R]; one pass over the rows.

    reference [R], of the type that is computed in: guesses, replaced by the results; good ones are neighbours' results.
    sums [R] is room for the work. The sums come first and the logarithms after them, so that both run without waiting.
    """
    count = rows.shape[0]
    for i in range(count):
        sums[i] = sum_exp(rows[i], reference[i])
    worst = False
    for i in range(count):
        total = sums[i]
        out[i] = np.float64(reference[i]) + log_of_sum(rows[0], total)
        worst |= not (SUM_LOW <= total <= SUM_HIGH)
    if worst:
        for i in range(count):
            if not (SUM_LOW <= sums[i] <= SUM_HIGH):
                out[i] = log_sum_exp_safe(rows[i])
    for i in range(count):
        reference[i] = computed(rows[0], out[i] if -1e30 < out[i] < 1e30 else 0.0)


@kernel
def scaled_softmax(source, target, lse, weight):
    """target = softmax(source) * weight; lse and weight have the type that is computed in. Arrays don't overlap."""
    for i in range(source.size):
        store(target, i, exp_like(load(source, i) - lse) * weight)


@kernel
def scaled_softmax_(row, lse, weight):
    """The same in place: one array, because a possible overlap would keep the loop from being vectorised."""
    for i in range(row.size):
        store(row, i, exp_like(load(row, i) - lse) * weight)


@kernel
def clamp_scale_(row, limit, scale):
    """row = clip(row, -limit, limit) * scale."""
    for i in range(row.size):
        value = load(row, i)
        value = limit if value > limit else value
        value = -limit if value < -limit else value
        store(row, i, value * scale)


@kernel
def gradient_row(source, target, inplace, lse, occ_blank, occ_label, blank, label, scale, clamp, fused):
    """One cell's gradient into target (into source when inplace).

    occ_blank, occ_label are the arcs' occupancies (label < 0: no label leaves the cell), scale the output's gradient.
    """
    gamma = occ_blank + occ_label
    row = source if inplace else target
    factor = scale if clamp <= 0 else 1.0
    base = computed(row, lse)
    at_blank, at_label = computed(row, 0.0), computed(row, 0.0)
    if not fused or gamma * factor == 0:
        row[:] = 0
    else:
        weight = computed(row, gamma * factor)
        at_blank = exp_like(load(source, blank) - base) * weight
        at_label = exp_like(load(source, max(label, 0)) - base) * weight
        if inplace:
            scaled_softmax_(source, base, weight)
        else:
            scaled_softmax(source, target, base, weight)
    store(row, blank, at_blank - computed(row, occ_blank * factor))
    if label >= 0:
        store(row, label, at_label - computed(row, occ_label * factor))
    if clamp > 0:
        clamp_scale_(row, computed(row, clamp), computed(row, scale))
