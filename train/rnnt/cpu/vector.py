"""The loops over a row in vectors of sixteen: the sum of exponentials, the scaled softmax, and tanh.

The compiler's own vectors leave up to 63 elements of a row to a scalar loop, and have no way to treat a row's ends. At
V=28 they cost 20 ns a row, these 7. LLVM splits such vectors for any target that it knows.
Exponentials are to base 2: 2**(x * LOG2E - base), so subtracting the row's logsumexp is part of a product. LOG2E is a
float32, 1e-8 too large, as if each score were. So results must be divided by the same number.
Half precision is the integers of its bits: uint16 is bfloat16, int16 is IEEE half. float64 has loops of its own.
Guarantees: nothing outside of the row is read or written. A result depends on its element and on `base` alone.
Try: `pytest tests/train/rnnt/test_numeric.py`.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .numeric import intrinsic

LANES = 16
LOG2E = float(np.float32(1.4426950408889634))  # rounded, as the loops use it
AHEAD = 16384  # bytes to prefetch ahead: the processor's own prefetching stops at the end of a page
LOW, HIGH = -127.0, 127.49  # 2**LOW counts as 0
_ROUND = 12582912.0 + 127.0  # 1.5 * 2**23 and the bias of an exponent: adding it leaves n + 127 in the low bits
# 2**f for |f| <= 1/2, minimax of degree 5: relative error 1.5e-7
_P = (1.0000001192092896, 0.693146944, 0.2402212024, 0.05550713092, 0.009675540961, 0.0013276472455)

_I16, _I32, _I64, _FLOAT, _HALF = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.HalfType()


def _of(element: ir.Type) -> ir.Type:
    return ir.VectorType(element, LANES)


def _splat(element: ir.Type, value) -> ir.Constant:
    value = float(np.float32(value)) if element is _FLOAT else int(value)
    return ir.Constant(_of(element), [ir.Constant(element, value)] * LANES)


def _broadcast(builder, value):
    one = builder.insert_element(ir.Constant(_of(value.type), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_of(_I32), [_I32(0)] * LANES))


def _fma(builder, a, b, c):
    kind = _of(_FLOAT)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, (kind, kind, kind)), f"llvm.fma.v{LANES}f32"
    )
    return builder.call(function, (a, b, c))


def _power(builder, x, base, bounded: bool):
    """Return 2**(x * LOG2E - base) as a product of two vectors, from the negated base. NaN stays, 0 at LOW and below.

    bounded: the power is known to be less than 2**127.
    """
    y = _fma(builder, x, _splat(_FLOAT, LOG2E), base)
    low, high, shift = _splat(_FLOAT, LOW), _splat(_FLOAT, HIGH), _splat(_FLOAT, _ROUND)
    y = builder.select(builder.fcmp_ordered(">", low, y), low, y)  # This order of operands keeps NaN.
    if not bounded:
        y = builder.select(builder.fcmp_ordered("<", high, y), high, y)
    shifted = builder.fadd(y, shift)
    f = builder.fsub(y, builder.fsub(shifted, shift))
    p = _splat(_FLOAT, _P[5])
    for c in _P[4::-1]:
        p = _fma(builder, p, f, _splat(_FLOAT, c))
    bits = builder.shl(builder.bitcast(shifted, _of(_I32)), _splat(_I32, 23))
    return p, builder.bitcast(bits, _of(_FLOAT))


class _Row:
    """Row `index` of a C-contiguous matrix, as vectors of float32."""

    def __init__(self, context, builder, array_type, array, index) -> None:
        struct = context.make_array(array_type)(context, builder, array)
        self.builder, self.dtype = builder, array_type.dtype
        self.element = {types.float32: _FLOAT, types.uint16: _I16, types.int16: _I16}[self.dtype]
        self.itemsize = 4 if self.element is _FLOAT else 2
        self.size = builder.extract_value(struct.shape, 1)
        pointer = builder.bitcast(struct.data, self.element.as_pointer())
        self.pointer = builder.gep(pointer, [builder.mul(index, self.size)])

    def load(self, at):
        """Return elements at, at+1, …"""
        address = self.builder.bitcast(self.builder.gep(self.pointer, [at]), _of(self.element).as_pointer())
        return self._widen(self.builder.load(address, align=self.itemsize, typ=_of(self.element)))

    def load_ahead(self, at):
        """Return elements at, at+1, …, and prefetch those some rows later."""
        b = self.builder
        address = b.gep(self.pointer, [b.add(at, _I64(AHEAD // self.itemsize))])
        address = b.bitcast(address, ir.IntType(8).as_pointer())
        function = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        b.call(function, [address, _I32(0), _I32(3), _I32(1)])  # to read, into the nearest cache, as data
        return self.load(at)

    def store(self, at, value):
        address = self.builder.bitcast(self.builder.gep(self.pointer, [at]), _of(self.element).as_pointer())
        self.builder.store(self._narrow(value), address, align=self.itemsize)

    def _widen(self, value):
        b = self.builder
        if self.dtype == types.float32:
            return value
        if self.dtype == types.int16:
            return b.fpext(b.bitcast(value, _of(_HALF)), _of(_FLOAT))
        return b.bitcast(b.shl(b.zext(value, _of(_I32)), _splat(_I32, 16)), _of(_FLOAT))

    def _narrow(self, value):
        b = self.builder
        if self.dtype == types.float32:
            return value
        if self.dtype == types.int16:
            return b.bitcast(b.fptrunc(value, _of(_HALF)), _of(_I16))
        nan = b.fcmp_unordered("uno", value, value)
        bits = b.bitcast(value, _of(_I32))
        odd = b.and_(b.lshr(bits, _splat(_I32, 16)), _splat(_I32, 1))
        rounded = b.lshr(b.add(b.add(bits, _splat(_I32, 0x7FFF)), odd), _splat(_I32, 16))
        return b.trunc(b.select(nan, _splat(_I32, 0x7FC0), rounded), _of(_I16))

    def _masked(self, name: str, result: ir.Type, first: list, rest: list):
        kind = _of(self.element)
        address = self.builder.bitcast(self.pointer, kind.as_pointer())
        args = [*first, address, _I32(self.itemsize), _below(self.builder, self.size), *rest]
        full = f"llvm.masked.{name}.v{LANES}{'f32' if self.element is _FLOAT else 'i16'}.p0"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(result, [a.type for a in args]), full
        )
        return self.builder.call(function, args)

    def load_short(self):
        """Return all elements of a row shorter than a vector, and zeros."""
        kind = _of(self.element)
        return self._widen(self._masked("load", kind, [], [ir.Constant(kind, None)]))

    def store_short(self, value):
        self._masked("store", ir.VoidType(), [self._narrow(value)], [])


def _below(builder, count):
    """Return which lanes are less than count."""
    lanes = ir.Constant(_of(_I64), [_I64(k) for k in range(LANES)])
    return builder.icmp_signed("<", lanes, _broadcast(builder, count))


@intrinsic
def sum_powers(typingctx, rows, index, base):
    """Return the sum of 2**(x * LOG2E - base) over row `index` of float32, uint16 or int16 [R, V].

    Most vectors begin on a cache line if the matrix does: across two lines, this loop, which only reads, is half as
    fast. The row's index decides where they begin, never its address, so one matrix has one result.
    """
    if not isinstance(rows, types.Array) or rows.ndim != 2 or rows.layout != "C" or rows.dtype == types.float64:
        return None

    def codegen(context, builder, signature, args):
        b = builder
        index = context.cast(b, args[1], signature.args[1], types.int64)
        row = _Row(context, b, signature.args[0], args[0], index)
        base = _broadcast(b, b.fneg(args[2]))
        zero = _splat(_FLOAT, 0)
        sums = [cgutils.alloca_once_value(b, zero) for _ in range(4)]

        def add(k, value, keep=None):
            p, scale = _power(b, value, base, bounded=False)
            if keep is not None:
                p, scale = b.select(keep, p, zero), b.select(keep, scale, zero)
            b.store(_fma(b, p, scale, b.load(sums[k])), sums[k])

        with b.if_else(b.icmp_signed("<", row.size, _I64(LANES))) as (short, long):
            with short:
                add(0, row.load_short(), _below(b, row.size))
            with long:
                past = b.and_(b.neg(b.mul(index, row.size)), _I64(LANES - 1))
                whole = b.and_(b.sub(row.size, past), _I64(-LANES))
                stop = b.add(past, whole)
                with b.if_then(b.icmp_signed(">", past, _I64(0))):  # Its last elements are counted below.
                    add(3, row.load(_I64(0)), _below(b, past))
                four = b.add(past, b.and_(whole, _I64(-4 * LANES)))
                with cgutils.for_range_slice(b, past, four, _I64(4 * LANES), _I64) as (at, _):
                    for k in range(4):
                        add(k, row.load_ahead(b.add(at, _I64(k * LANES))))
                with cgutils.for_range_slice(b, four, stop, _I64(LANES), _I64) as (at, _):
                    add(1, row.load_ahead(at))
                rest = b.sub(row.size, stop)
                with b.if_then(b.icmp_signed(">", rest, _I64(0))):  # Its first elements are counted above.
                    outside = _below(b, b.sub(_I64(LANES), rest))
                    add(2, row.load(b.sub(row.size, _I64(LANES))), b.not_(outside))
        a, c, d, e = (b.load(s) for s in sums)
        total = b.fadd(b.fadd(a, c), b.fadd(d, e))
        width = LANES
        while width > 1:  # Add one half of the vector to the other.
            width //= 2
            order = ir.Constant(_of(_I32), [_I32((k + width) % LANES) for k in range(LANES)])
            total = b.fadd(total, b.shuffle_vector(total, total, order))
        return b.extract_element(total, _I32(0))

    return types.float32(rows, types.intp, types.float32), codegen


@intrinsic
def scale_powers(typingctx, rows, source, out, target, base, weight):
    """Set row `target` of out to 2**(x * LOG2E - base) * weight of row `source` of rows, which may be the same row.

    The power must be less than 2**127, as it is if base is the row's own logsumexp.
    """
    if not isinstance(rows, types.Array) or rows.ndim != 2 or rows.layout != "C" or rows.dtype == types.float64:
        return None

    def codegen(context, builder, signature, args):
        b = builder
        numbers = [context.cast(b, args[k], signature.args[k], types.int64) for k in (1, 3)]
        row = _Row(context, b, signature.args[0], args[0], numbers[0])
        result = _Row(context, b, signature.args[2], args[2], numbers[1])
        base, weight = _broadcast(b, b.fneg(args[4])), _broadcast(b, args[5])

        def value(x):
            p, scale = _power(b, x, base, bounded=True)
            return b.fmul(p, b.fmul(scale, weight))

        with b.if_else(b.icmp_signed("<", row.size, _I64(LANES))) as (short, long):
            with short:
                result.store_short(value(row.load_short()))
            with long:
                last = b.sub(row.size, _I64(LANES))
                end = row.load(last)  # Read before it is written over: the last two vectors may overlap.
                four = b.and_(row.size, _I64(-4 * LANES))
                with cgutils.for_range_slice(b, _I64(0), four, _I64(4 * LANES), _I64) as (at, _):
                    places = [b.add(at, _I64(k * LANES)) for k in range(4)]
                    results = [value(row.load_ahead(place)) for place in places]
                    for place, v in zip(places, results):
                        result.store(place, v)
                whole = b.and_(row.size, _I64(-LANES))
                with cgutils.for_range_slice(b, four, whole, _I64(LANES), _I64) as (at, _):
                    result.store(at, value(row.load_ahead(at)))
                with b.if_then(b.icmp_signed("<", whole, row.size)):
                    result.store(last, value(end))
        return context.get_dummy_value()

    return types.void(rows, types.intp, rows, types.intp, types.float32, types.float32), codegen


@intrinsic
def combine_tanh(typingctx, left, i, right, j, out, k, multiply):
    """Set row k of out to tanh(row i of left + row j of right), or of the product. Absolute error 2e-7.

    All are float32, and NaN stays. The compiler's own loop of the same arithmetic took six times as long.
    """
    arrays = (left, right, out)
    if not all(isinstance(a, types.Array) and a.ndim == 2 and a.layout == "C" for a in arrays):
        return None
    if any(a.dtype != types.float32 for a in arrays):
        return None

    def codegen(context, builder, signature, args):
        b = builder
        numbers = [context.cast(b, args[n], signature.args[n], types.int64) for n in (1, 3, 5)]
        a, c, result = (_Row(context, b, signature.args[n], args[n], at) for n, at in zip((0, 2, 4), numbers))
        one, two, zero = (_splat(_FLOAT, n) for n in (1, 2, 0))

        def value(x, y):
            x = b.select(_broadcast(b, args[6]), b.fmul(x, y), b.fadd(x, y))
            p, scale = _power(b, b.fadd(x, x), zero, bounded=False)
            return b.fsub(one, b.fdiv(two, _fma(b, p, scale, one)))

        with b.if_else(b.icmp_signed("<", result.size, _I64(LANES))) as (short, long):
            with short:
                result.store_short(value(a.load_short(), c.load_short()))
            with long:
                whole = b.and_(result.size, _I64(-LANES))
                with cgutils.for_range_slice(b, _I64(0), whole, _I64(LANES), _I64) as (at, _):
                    result.store(at, value(a.load(at), c.load(at)))
                with b.if_then(b.icmp_signed("<", whole, result.size)):  # The last vector overlaps.
                    last = b.sub(result.size, _I64(LANES))
                    result.store(last, value(a.load(last), c.load(last)))
        return context.get_dummy_value()

    return types.void(left, types.intp, right, types.intp, out, types.intp, types.boolean), codegen
