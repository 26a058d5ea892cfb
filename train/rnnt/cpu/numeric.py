"""Arithmetic that the CPU kernels share: exp and log1p that vectorise, half precision, an atomic counter.

numba's LLVM has no vector maths library. A loop that calls math.exp computes one element at a time, one that calls
exp32 sixteen.
Guarantees: no function is compiled with fast-math flags, here or in the kernels, so the error bounds in the docstrings
hold wherever it is inlined. numba gives a function's flags to all that is inlined into it, and reassociation would undo
the rounding trick in exp32. Sums that may be regrouped ask for it one by one (sum_add).
Try: `pytest tests/train/rnnt/test_numeric.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from ..cache import compiled

f32 = np.float32
intrinsic: Any = _intrinsic  # An intrinsic is called with fewer arguments than it is written with.

# exp(r) for |r| <= ln2/2, Chebyshev fit of degree 5: relative error 8e-8
_E0, _E1, _E2 = f32(1.0000000710715018), f32(0.9999996659625519), f32(0.49998898640584116)
_E3, _E4, _E5 = f32(0.16667663235097127), f32(0.041915077842656), f32(0.008291708380161897)
_LOG2E, _LN2_HI, _LN2_LO = f32(1.4426950408889634), f32(0.693359375), f32(-2.12194440e-4)
_ROUND = f32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the mantissa
_LOW, _HIGH = f32(-88.0), f32(88.37)

# log1p(x)/x on [0, 1], degree 8: relative error 3e-8
_L0, _L1, _L2 = f32(0.9999999705406526), f32(-0.4999950151676538), f32(0.33319271342202444)
_L3, _L4, _L5 = f32(-0.24844369890612375), f32(0.19111431074442628), f32(-0.13674769693983263)
_L6, _L7, _L8 = f32(0.07836166789479006), f32(-0.029588507322234742), f32(0.005253457780428041)

# log1p(x)/x between sqrt(1/2)-1 and sqrt(2)-1, degree 9: relative error 4e-9
_M0, _M1, _M2, _M3, _M4 = f32(1.0), f32(-0.49999988), f32(0.33333324), f32(-0.25001585), f32(0.20002072)
_M5, _M6, _M7 = f32(-0.16609126), f32(0.14180079), f32(-0.13240843)
_M8, _M9 = f32(0.1291417), f32(-0.076385924)
_LN2 = 0.6931471805599453


KERNEL_SOURCES = ("lattice", "numeric", "plan", "pruned", "rows", "tdt", "tiles", "vector")


def _fingerprint() -> tuple[float, int]:
    """Return the newest time and the total size of the sources that hold kernels."""
    stats = [Path(__file__).with_name(name + ".py").stat() for name in KERNEL_SOURCES]
    return max(s.st_mtime for s in stats), sum(s.st_size for s in stats)


_STAMP = _fingerprint()


def kernel(function, **options):
    """Compile a function with `compiled`, cached on disk until any kernel's source changes.

    numba by itself looks at a function's own file only, and would keep what it has inlined from another file.
    """
    dispatcher = compiled(function, **options)
    index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if index is not None and hasattr(index, "_source_stamp"):
        index._source_stamp = _STAMP
    return dispatcher


def inlined_kernel(function):
    """Compile a kernel for one row, always inlined: passing its arrays takes longer than computing a short row."""
    return kernel(function, forceinline=True)


_I16, _I32 = ir.IntType(16), ir.IntType(32)
_FLOAT = ir.FloatType()


def _unary(source, target, emit):
    """Return an intrinsic of one argument. numba itself would widen this integer arithmetic to 64 bits."""

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


# 2**n of a float32 that holds n in its low mantissa bits.
power_of_two = _unary(types.float32, types.float32, _emit_power)
# A positive normal float32 is mantissa * 2**exponent, with the mantissa in [sqrt(1/2), sqrt(2)).
exponent = _unary(types.float32, types.float32, _emit_exponent)
mantissa = _unary(types.float32, types.float32, _emit_mantissa)
# bfloat16 is the uint16 of its bits, IEEE half precision the int16. float_to_* round to nearest, ties to even.
bfloat_to_float = _unary(types.uint16, types.float32, lambda b, v: b.bitcast(b.shl(b.zext(v, _I32), _I32(16)), _FLOAT))
float_to_bfloat = _unary(types.float32, types.uint16, _emit_to_bfloat)
half_to_float = _unary(types.int16, types.float32, lambda b, v: b.fpext(b.bitcast(v, ir.HalfType()), _FLOAT))
float_to_half = _unary(types.float32, types.int16, lambda b, v: b.bitcast(b.fptrunc(v, ir.HalfType()), _I16))


@intrinsic
def fma(typingctx, a, b, c):
    """Return a*b + c with one rounding, in the one floating type of the arguments."""
    if not (a == b == c) or a not in (types.float32, types.float64):
        return None

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return a(a, a, a), codegen


@intrinsic
def sum_add(typingctx, a, b):
    """Return a + b of one floating type. A loop may regroup such sums, and so vectorise, but change nothing else."""
    if a != b or a not in (types.float32, types.float64):
        return None

    def codegen(context, builder, signature, args):
        return builder.fadd(*args, flags=("reassoc", "nsz"))

    return a(a, a), codegen


@intrinsic
def borrow(typingctx, array):
    """Return the same array without its reference count. The caller keeps the array alive.

    Each slice of an array counts a reference, atomically, on one cache line for all threads. Per row that costs more
    than the arithmetic.
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
    """Add value to array[index] of an int64 array, atomically, and return the value before. Orders memory both ways."""
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
    """Return exp of a float32, relative error 2.2e-7. It is exactly 0 at -88 and below (-inf too), NaN for NaN.

    x is clamped at 88.37, where the result is 2.4e38. Callers compute sums that are too large again.
    """
    x = _LOW if x < _LOW else x  # This order of operands keeps NaN.
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
    # The integer is in the low mantissa bits. A product, not an addition of exponents, keeps NaN.
    return p * power_of_two(shifted)


@kernel
def log1p_unit32(x):
    """Return log(1 + x) of a float32 in [0, 1], relative error 2e-7."""
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
    """Return log of a positive normal float32, as float64 with the digits of a float32: absolute error 1e-7."""
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
def log_add(a, b):
    """Return log(exp(a) + exp(b)) of float64 values. The correction is in float32: absolute error 1e-7."""
    high = a if a > b else b
    low = b if a > b else a
    return high + np.float64(log1p_unit32(exp32(f32(low - high))))


@kernel
def log_add_exact(a, b):
    """Return log(exp(a) + exp(b)) of float64 values to full precision, one at a time."""
    high = a if a > b else b
    low = b if a > b else a
    return high + math.log1p(math.exp(low - high))
