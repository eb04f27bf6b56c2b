"""Arithmetic and bit instructions: one builder for each opcode family.

Semantics are those of the PTX ISA 9.0; rounding is in ``floats``. Only the modifiers named here are known: no .ftz,
.sat, .approx or directed rounding of results, since correct builds of this project emit none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from . import parser as syntax
from .decode import Form, Step, opcode
from .faults import MachineFault
from .lanes import Batch, Lanes
from .types import BITS, FLOATS, INTEGERS, SIGNED, TYPES, UNSIGNED, PtxType

PRED, B32, U32 = TYPES["pred"], TYPES["b32"], TYPES["u32"]


# ------------------------------------------------------------------------------------------------ arithmetic
def _exact(function: Callable[..., Any], kind: PtxType) -> Callable[..., Any]:
    """A numpy function, with PTX's NaN for float results."""
    if not kind.is_float or kind.size == 8:
        return function
    return lambda *operands: floats.canonical(function(*operands))


@opcode("add", "sub")
def _add_sub(form: Form) -> Step:
    """add, sub: integers wrap; floats round to nearest even (.rn, which is also the default)."""
    kind = form.type(INTEGERS | FLOATS)
    if kind.is_float:
        form.take("rn")
    return form.compute(_exact(np.add if form.opcode == "add" else np.subtract, kind), kind, kind, kind)


@opcode("mul")
def _mul(form: Form) -> Step:
    """mul: float .rn; integer .lo, .hi (upper half of the double-width product) or .wide (all of it)."""
    kind = form.type(INTEGERS | FLOATS)
    if kind.is_float:
        form.take("rn")
        return form.compute(_exact(np.multiply, kind), kind, kind, kind)
    part = form.need("lo", "hi", "wide")
    result = _double(kind, form) if part == "wide" else kind
    return form.compute(_product(part, kind, result), result, kind, kind)


@opcode("mad")
def _mad(form: Form) -> Step:
    """mad: integer product (.lo, .hi, .wide) plus a third operand of the result's width."""
    kind = form.type(INTEGERS)
    part = form.need("lo", "hi", "wide")
    result = _double(kind, form) if part == "wide" else kind
    product = _product(part, kind, result)
    return form.compute(lambda a, b, c: product(a, b) + c, result, kind, kind, result)


def _double(kind: PtxType, form: Form) -> PtxType:
    if kind.size == 8:
        raise form.unknown(".wide of 64 bits")
    return TYPES[f"{kind.kind}{16 * kind.size}"]


def _product(part: str, kind: PtxType, result: PtxType) -> Callable[[Any, Any], Any]:
    if part == "lo":
        return np.multiply
    if part == "wide":
        return lambda a, b: a.astype(result.dtype) * b.astype(result.dtype)
    if kind.size < 8:
        wide = TYPES[f"{kind.kind}{16 * kind.size}"].dtype
        shift = wide.type(8 * kind.size)
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> shift).astype(kind.dtype)
    return _high_signed if kind.is_signed else _high_unsigned


def _high_unsigned(a: Any, b: Any) -> Any:
    """Upper 64 bits of a 64 x 64-bit product, from four 32 x 32-bit ones."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    middle_low = (middle & low) + a0 * b1
    return a1 * b1 + (middle >> half) + (middle_low >> half)


def _high_signed(a: Any, b: Any) -> Any:
    high = _high_unsigned(a.view(np.uint64), b.view(np.uint64)).view(np.int64)
    return high - np.where(a < 0, b, np.int64(0)) - np.where(b < 0, a, np.int64(0))


@opcode("fma")
def _fma(form: Form) -> Step:
    """fma.rn: one rounding."""
    kind = form.type(FLOATS)
    form.need("rn")
    return form.compute(_exact(floats.fma, kind), kind, kind, kind, kind)


@opcode("div", "rem")
def _div_rem(form: Form) -> Step:
    """div, rem: float .rn only; integers truncate toward zero, and a zero divisor is a fault."""
    kind = form.type(INTEGERS | (FLOATS if form.opcode == "div" else frozenset()))
    if kind.is_float:
        form.need("rn")
        return form.compute(_exact(np.divide, kind), kind, kind, kind)

    def remainder(a: Any, b: Any) -> Any:
        zero = np.broadcast_to(b == 0, np.broadcast_shapes(np.shape(a), np.shape(b)))
        if zero.any():
            raise MachineFault("integer division by zero", int(np.argmax(zero)))
        return np.fmod(a, b)

    if form.opcode == "rem":
        return form.compute(remainder, kind, kind, kind)
    return form.compute(lambda a, b: (a - remainder(a, b)) // b, kind, kind, kind)


@opcode("sqrt", "rcp")
def _sqrt_rcp(form: Form) -> Step:
    """sqrt.rn, rcp.rn: correctly rounded."""
    kind = form.type(FLOATS)
    form.need("rn")
    one = kind.dtype.type(1)
    function = np.sqrt if form.opcode == "sqrt" else lambda a: np.divide(one, a)
    return form.compute(_exact(function, kind), kind, kind)


@opcode("abs", "neg")
def _abs_neg(form: Form) -> Step:
    """abs, neg: of a float they change only the sign bit; of an integer they wrap."""
    kind = form.type(SIGNED | FLOATS)
    # a payload may pass through or become canonical (the ISA leaves it open); the canonical one is what GPUs give
    return form.compute(_exact(np.abs if form.opcode == "abs" else np.negative, kind), kind, kind)


@opcode("min", "max")
def _min_max(form: Form) -> Step:
    """min, max: a NaN operand loses against a number, unless .NaN."""
    kind = form.type(INTEGERS | FLOATS)
    if not kind.is_float:
        return form.compute(np.minimum if form.opcode == "min" else np.maximum, kind, kind, kind)
    number = floats.minimum if form.opcode == "min" else floats.maximum
    if form.take("NaN"):
        nan = np.array(np.nan, kind.dtype)
        return form.compute(
            _exact(lambda a, b: np.where((a != a) | (b != b), nan, number(a, b)), kind), kind, kind, kind
        )
    return form.compute(number, kind, kind, kind)


@opcode("copysign")
def _copysign(form: Form) -> Step:
    """copysign d, a, b: the sign of a on the magnitude of b."""
    kind = form.type(FLOATS)
    return form.compute(lambda a, b: np.copysign(b, a), kind, kind, kind)


@opcode("testp")
def _testp(form: Form) -> Step:
    """testp: class of a float."""
    kind = form.type(FLOATS)
    tiny = np.finfo(kind.dtype).tiny
    tests: dict[str, Callable[[Any], Any]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    return form.compute(tests[form.need(*tests)], PRED, kind)


# ------------------------------------------------------------------------------------------------ bits
@opcode("and", "or", "xor")
def _logic(form: Form) -> Step:
    """and, or, xor of bits or predicates."""
    kind = form.type(BITS | {"pred"})
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[form.opcode]
    return form.compute(function, kind, kind, kind)


@opcode("not")
def _not(form: Form) -> Step:
    """not: every bit flipped."""
    kind = form.type(BITS | {"pred"})
    return form.compute(np.invert, kind, kind)


@opcode("cnot")
def _cnot(form: Form) -> Step:
    """cnot: 1 where the operand is 0, else 0."""
    kind = form.type(BITS)
    return form.compute(lambda a: (a == 0).astype(kind.dtype), kind, kind)


@opcode("shl", "shr")
def _shift(form: Form) -> Step:
    """shl, shr: amounts of the width and above give 0, or copies of the sign for a signed shr."""
    kind = form.type(BITS if form.opcode == "shl" else BITS | INTEGERS)
    width = 8 * kind.size
    numpy_shift = np.left_shift if form.opcode == "shl" else np.right_shift

    def shift(a: Any, amount: Any) -> Any:
        small = np.minimum(amount, np.uint32(width - 1)).astype(kind.dtype)
        result = numpy_shift(a, small)
        if kind.is_signed:
            return result
        return np.where(amount < width, result, kind.dtype.type(0))

    return form.compute(shift, kind, kind, U32)


@opcode("shf")
def _funnel_shift(form: Form) -> Step:
    """shf.l, shf.r: 32 bits out of a 64-bit pair (low, high); amount modulo 32 (.wrap) or at most 32 (.clamp)."""
    form.type({"b32"})
    left = form.need("l", "r") == "l"
    wrap = form.need("wrap", "clamp") == "wrap"
    form.count(4)

    def shift(low: Any, high: Any, amount: Any) -> Any:
        n = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        pair = (high.astype(np.uint64) << np.uint64(32)) | low
        shifted = (pair << n) >> np.uint64(32) if left else pair >> n
        return shifted.astype(np.uint32)

    return form.compute(shift, B32, B32, B32, U32)


@opcode("lop3")
def _lop3(form: Form) -> Step:
    """lop3: any logic function of three words, its truth table as the fourth operand."""
    form.type({"b32"})
    form.count(5)
    table = form.operands[4]
    if not isinstance(table, syntax.Literal):
        raise form.unknown("truth table that is no constant")
    a, b, c = (form.source(k, "b32") for k in (1, 2, 3))
    write = form.destination(0, "b32")
    terms = [k for k in range(8) if table.value >> k & 1]

    def step(batch: Batch, lanes: Lanes) -> None:
        x, y, z = a(batch, lanes), b(batch, lanes), c(batch, lanes)
        result = np.zeros(lanes.count, np.uint32)
        for k in terms:  # bit k of the table: inputs (a, b, c) = (k >> 2, k >> 1, k) & 1
            result |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        write(batch, lanes, result)

    return step


@opcode("prmt")
def _permute(form: Form) -> Step:
    """prmt: pick four bytes out of eight; bit 3 of a selector copies the byte's sign instead."""
    form.type({"b32"})

    def permute(a: Any, b: Any, selector: Any) -> Any:
        pair = (b.astype(np.uint64) << np.uint64(32)) | a
        result: Any = np.uint64(0)
        for k in range(4):
            pick = (selector >> np.uint32(4 * k)) & np.uint32(15)
            byte = (pair >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte >= 128, np.uint64(0xFF), np.uint64(0))
            result = result | (np.where(pick & np.uint32(8), sign, byte) << np.uint64(8 * k))
        return result.astype(np.uint32)

    return form.compute(permute, B32, B32, B32, B32)


@opcode("bfe")
def _bit_field_extract(form: Form) -> Step:
    """bfe d, a, position, length: a field of bits, sign-extended for signed types."""
    kind = form.type({"u32", "s32", "u64", "s64"})
    width = 8 * kind.size
    bits = kind.bits

    def extract(a: Any, position: Any, length: Any) -> Any:
        raw, p, n = np.broadcast_arrays(a.view(bits), position & np.uint32(0xFF), length & np.uint32(0xFF))
        moved = np.where(p < width, raw >> np.minimum(p, width - 1).astype(bits), bits.type(0))
        field = moved & _low_ones(n, bits)
        if kind.is_signed:
            # the sign is the field's last bit, or the word's where the field reaches beyond it
            last = np.minimum(p.astype(np.int64) + n - 1, width - 1)
            negative = ((raw >> np.maximum(last, 0).astype(bits)) & bits.type(1)).astype(bool) & (n > 0)
            field = np.where(negative, field | ~_low_ones(np.clip(last - p + 1, 0, width), bits), field)
        return field

    return form.compute(extract, kind, kind, U32, U32)


def _low_ones(count: Any, bits: np.dtype[Any]) -> Any:
    """``count`` ones at the low end, all where it is the width or more."""
    width = 8 * bits.itemsize
    partial = (bits.type(1) << np.minimum(count, width - 1).astype(bits)) - bits.type(1)
    return np.where(count >= width, ~bits.type(0), partial)


@opcode("bfi")
def _bit_field_insert(form: Form) -> Step:
    """bfi d, a, b, position, length: the low bits of a into a field of b."""
    kind = form.type({"b32", "b64"})
    form.count(5)
    width, bits = 8 * kind.size, kind.bits
    a, b = form.source(1, kind), form.source(2, kind)
    position, length = form.source(3, "u32"), form.source(4, "u32")
    write = form.destination(0, kind)

    def step(batch: Batch, lanes: Lanes) -> None:
        p = np.atleast_1d(position(batch, lanes) & np.uint32(0xFF)).astype(np.int64)
        n = np.atleast_1d(length(batch, lanes) & np.uint32(0xFF)).astype(np.int64)
        mask = np.where(p < width, _low_ones(np.minimum(n, width), bits) << np.minimum(p, width - 1).astype(bits), 0)
        mask = mask.astype(bits)
        moved = np.atleast_1d(a(batch, lanes)) << np.minimum(p, width - 1).astype(bits)
        result = (b(batch, lanes) & ~mask) | (moved & mask)
        write(batch, lanes, np.ascontiguousarray(np.broadcast_to(result, lanes.count)))

    return step


@opcode("popc", "clz", "brev", "bfind")
def _count_bits(form: Form) -> Step:
    """popc, clz (width when zero), brev, bfind (unsigned; all ones when zero; .shiftamt counts from the top)."""
    kind = form.type(UNSIGNED - {"u16"} if form.opcode == "bfind" else {"b32", "b64"})
    width, bits = 8 * kind.size, kind.bits

    def length(a: Any) -> Any:
        """Position of the highest one plus 1, by binary search."""
        result = np.zeros(np.shape(a), np.uint32)
        rest = a
        step = width // 2
        while step:
            high = rest >> bits.type(step)
            result = np.where(high != 0, result + np.uint32(step), result)
            rest = np.where(high != 0, high, rest)
            step //= 2
        return np.where(a != 0, result + np.uint32(1), np.uint32(0)).astype(np.uint32)

    def reverse(a: Any) -> Any:
        result = a
        for k, pattern in enumerate((0x55, 0x33, 0x0F)):
            mask, shift = bits.type(int.from_bytes(bytes([pattern] * kind.size), "little")), bits.type(1 << k)
            result = ((result & mask) << shift) | ((result >> shift) & mask)
        return np.asarray(result).byteswap()

    if form.opcode == "popc":
        return form.compute(lambda a: np.bitwise_count(a).astype(np.uint32), B32, kind)
    if form.opcode == "clz":
        return form.compute(lambda a: np.uint32(width) - length(a), B32, kind)
    if form.opcode == "brev":
        return form.compute(reverse, kind, kind)
    none = np.uint32(0xFFFFFFFF)
    if form.take("shiftamt"):
        return form.compute(lambda a: np.where(a != 0, np.uint32(width) - length(a), none), B32, kind)
    return form.compute(lambda a: length(a) - np.uint32(1), B32, kind)
