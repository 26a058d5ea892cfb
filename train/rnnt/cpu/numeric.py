"""Arithmetic that the CPU kernels share: exp and log1p that vectorise, half precision, an atomic counter.

Invariant: no function is compiled with fast-math flags, here or in the kernels, so that the error bounds in the
docstrings hold wherever it is inlined: numba gives a function's flags to all that is inlined into it, and
reassociation would undo the rounding trick in exp32. Sums that may be regrouped say so one by one (sum_add).
numba's LLVM has no vector maths library: a loop that calls math.exp runs one element at a time, one that calls exp32
sixteen.
Run: pytest tests/train/rnnt/test_numeric.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

f32 = np.float32
intrinsic: Any = _intrinsic  # what it makes is called with fewer arguments than it is written with

# exp(r) for |r| <= ln2/2, Chebyshev fit of degree 5: relative error 8e-8
_E0, _E1, _E2 = f32(1.0000000710715018), f32(0.9999996659625519), f32(0.49998898640584116)
_E3, _E4, _E5 = f32(0.16667663235097127), f32(0.041915077842656), f32(0.008291708380161897)
_LOG2E, _LN2_HI, _LN2_LO = f32(1.4426950408889634), f32(0.693359375), f32(-2.12194440e-4)
_ROUND = f32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the mantissa
_LOW, _HIGH = f32(-88.0), f32(88.37)

# log1p(x)/x on [0, 1], degree 8: relative error 3e-8
_L = tuple(
    f32(c)
    for c in (
        0.9999999705406526,
        -0.4999950151676538,
        0.33319271342202444,
        -0.24844369890612375,
        0.19111431074442628,
        -0.13674769693983263,
        0.07836166789479006,
        -0.029588507322234742,
        0.005253457780428041,
    )
)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = _L


# log1p(x)/x between sqrt(1/2)-1 and sqrt(2)-1, degree 9: relative error 4e-9
_M0, _M1, _M2, _M3, _M4 = f32(1.0), f32(-0.49999988), f32(0.33333324), f32(-0.25001585), f32(0.20002072)
_M5, _M6, _M7 = f32(-0.16609126), f32(0.14180079), f32(-0.13240843)
_M8, _M9 = f32(0.1291417), f32(-0.076385924)
_LN2 = 0.6931471805599453


def _fingerprint() -> tuple[float, int]:
    """Newest time and total size of the sources that hold kernels."""
    names = ("numeric", "vector", "rows", "plan", "lattice", "tiles", "tdt", "pruned")
    stats = [Path(__file__).with_name(name + ".py").stat() for name in names]
    return max(s.st_mtime for s in stats), sum(s.st_size for s in stats)


_STAMP = _fingerprint()


def kernel(function, **options):
    """njit without the interpreter's lock, cached on disk until the source of any kernel changes.

    numba by itself looks at the one file of a function, and would keep what it has inlined from another file.
    """
    dispatcher = njit(cache=True, nogil=True, **options)(function)
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if index is not None and hasattr(index, "_source_stamp"):
        index._source_stamp = _STAMP
    return dispatcher


def inlined_kernel(function):
    """A kernel for one row: the arrays among its arguments take longer to hand over than a short row to compute."""
    return kernel(function, forceinline=True)


_I16, _I32 = ir.IntType(16), ir.IntType(32)
_FLOAT = ir.FloatType()


def _unary(source, target, emit):
    """An intrinsic of one argument; numba would widen the integer arithmetic in here to 64 bits."""

    @intrinsic
    def function(typingctx, value):
        if value != source:
            return None

        def codegen(context, builder, signature, args):
            return emit(builder, args[0])

        return target(source), codegen

    return function


def _emit_power(builder, shifted):
    n = builder.bitcast(shifted, _I32)
    return builder.bitcast(builder.shl(builder.add(n, _I32(127)), _I32(23)), _FLOAT)


def _emit_exponent(builder, value):
    n = builder.ashr(builder.sub(builder.bitcast(value, _I32), _I32(0x3F3504F3)), _I32(23))
    return builder.sitofp(n, _FLOAT)


def _emit_mantissa(builder, value):
    bits = builder.bitcast(value, _I32)
    n = builder.ashr(builder.sub(bits, _I32(0x3F3504F3)), _I32(23))
    return builder.bitcast(builder.sub(bits, builder.shl(n, _I32(23))), _FLOAT)


def _emit_to_bfloat(builder, value):
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _I32(0x7FFF)), odd), _I32(16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, _I32(0x7FC0), rounded), _I16)


# 2**n of a float32 whose low mantissa bits hold n
power_of_two = _unary(types.float32, types.float32, _emit_power)
# a positive normal float32 as mantissa * 2**exponent, mantissa in [sqrt(1/2), sqrt(2))
exponent = _unary(types.float32, types.float32, _emit_exponent)
mantissa = _unary(types.float32, types.float32, _emit_mantissa)
# bfloat16 is given as the uint16 of its bits, IEEE half precision as the int16; to_* round to nearest, ties to even
bfloat_to_float = _unary(types.uint16, types.float32, lambda b, v: b.bitcast(b.shl(b.zext(v, _I32), _I32(16)), _FLOAT))
float_to_bfloat = _unary(types.float32, types.uint16, _emit_to_bfloat)
half_to_float = _unary(types.int16, types.float32, lambda b, v: b.fpext(b.bitcast(v, ir.HalfType()), _FLOAT))
float_to_half = _unary(types.float32, types.int16, lambda b, v: b.bitcast(b.fptrunc(v, ir.HalfType()), _I16))


@intrinsic
def fma(typingctx, a, b, c):
    """a*b + c with one rounding, in the arguments' one floating type."""
    if not (a == b == c) or a not in (types.float32, types.float64):
        return None

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return a(a, a, a), codegen


@intrinsic
def sum_add(typingctx, a, b):
    """a + b of one floating type that a loop may regroup, so that a sum vectorises; nothing else in it may change."""
    if a != b or a not in (types.float32, types.float64):
        return None

    def codegen(context, builder, signature, args):
        return builder.fadd(*args, flags=("reassoc", "nsz"))

    return a(a, a), codegen


@intrinsic
def borrow(typingctx, array):
    """The same array without its reference count; the caller keeps the array alive.

    Every slice of an array counts a reference, atomically, on one cache line for all threads: per row that costs more
    than its arithmetic.
    """
    if not isinstance(array, types.Array):
        return None

    def codegen(context, builder, signature, args):
        result = context.make_array(signature.return_type)(context, builder, args[0])
        for name in ("meminfo", "parent"):
            setattr(result, name, cgutils.get_null_value(getattr(result, name).type))
        return result._getvalue()

    return array(array), codegen


@intrinsic
def fetch_add(typingctx, array, index, value):
    """array[index] += value for int64 arrays, atomically; returns the value before. Orders memory both ways."""
    if not isinstance(array, types.Array) or array.dtype != types.int64:
        return None
    array_type = array

    def codegen(context, builder, signature, args):
        struct = context.make_array(array_type)(context, builder, args[0])
        index = context.cast(builder, args[1], signature.args[1], types.intp)
        value = context.cast(builder, args[2], signature.args[2], types.int64)
        pointer = cgutils.get_item_pointer(context, builder, array_type, struct, [index])
        return builder.atomic_rmw("add", pointer, value, "acq_rel")

    return types.int64(array, index, value), codegen


@intrinsic
def clear_rows(typingctx, rows, start, stop):
    """Rows start..stop of a C-contiguous matrix become zeros: a memset, where a slice's assignment goes by strides."""
    if not isinstance(rows, types.Array) or rows.ndim != 2 or rows.layout != "C":
        return None

    def codegen(context, builder, signature, args):
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        size = builder.mul(builder.extract_value(struct.shape, 1), struct.itemsize)
        first, last = (context.cast(builder, args[k], signature.args[k], types.intp) for k in (1, 2))
        pointer = builder.gep(builder.bitcast(struct.data, cgutils.voidptr_t), [builder.mul(first, size)])
        cgutils.memset(builder, pointer, builder.mul(builder.sub(last, first), size), 0)
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp), codegen


@kernel
def exp32(x):
    """exp of a float32, relative error 2.2e-7; exactly 0 at -88 and below (-inf too), NaN for NaN.

    Clamped at 88.37, where it is 2.4e38: callers look for sums that are too large, and take them again.
    """
    x = _LOW if x < _LOW else x  # this order of operands lets NaN through
    x = _HIGH if x > _HIGH else x
    shifted = fma(x, _LOG2E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN2_HI, x)
    r = fma(n, -_LN2_LO, r)
    p = fma(_E5, r, _E4)
    p = fma(p, r, _E3)
    p = fma(p, r, _E2)
    p = fma(p, r, _E1)
    p = fma(p, r, _E0)
    # the integer sits in the low mantissa bits; a product, not an addition of exponents, keeps NaN
    return p * power_of_two(shifted)


@kernel
def log1p_unit32(x):
    """log(1 + x) of a float32 in [0, 1], relative error 2e-7."""
    p = fma(_L8, x, _L7)
    p = fma(p, x, _L6)
    p = fma(p, x, _L5)
    p = fma(p, x, _L4)
    p = fma(p, x, _L3)
    p = fma(p, x, _L2)
    p = fma(p, x, _L1)
    p = fma(p, x, _L0)
    return p * x


@kernel
def log32(x):
    """log of a positive normal float32, as float64 with the digits of a float32: absolute error 1e-7."""
    m = mantissa(x) - f32(1)
    p = fma(_M9, m, _M8)
    p = fma(p, m, _M7)
    p = fma(p, m, _M6)
    p = fma(p, m, _M5)
    p = fma(p, m, _M4)
    p = fma(p, m, _M3)
    p = fma(p, m, _M2)
    p = fma(p, m, _M1)
    p = fma(p, m, _M0)
    return np.float64(exponent(x)) * _LN2 + np.float64(p * m)


@kernel
def tanh32(x):
    """tanh of a float32, absolute error 2e-7."""
    return f32(1) - f32(2) / (f32(1) + exp32(x + x))


@kernel
def log_add(a, b):
    """log(exp(a) + exp(b)) of float64 values; the correction is computed in float32: absolute error 1e-7."""
    high = a if a > b else b
    low = b if a > b else a
    return high + np.float64(log1p_unit32(exp32(f32(low - high))))


@kernel
def log_add_exact(a, b):
    """log(exp(a) + exp(b)) of float64 values to full precision, one at a time."""
    high = a if a > b else b
    low = b if a > b else a
    return high + math.log1p(math.exp(low - high))
