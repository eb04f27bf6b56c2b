"""Comparison, selection, move and conversion instructions: one builder for each opcode family.

Rounding is in ``floats``. Of the roundings of results only .rn is known; .sat, .relu and .ftz are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats
from . import parser as syntax
from .decode import Form, Step, opcode
from .lanes import Batch, Lanes
from .types import BITS, FLOATS, INTEGERS, TYPES, PtxType

PRED = TYPES["pred"]


# ------------------------------------------------------------------------------------------------ comparison, selection
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(name: str, kind: PtxType, form: Form) -> Callable[[Any, Any], Any]:
    """The function of setp's comparison; an unordered one (``ltu``) is also true for NaN, an ordered one false."""
    if kind.kind == "u" and name in _UNSIGNED_NAMES:
        return _COMPARE[_UNSIGNED_NAMES[name]]
    if name in _COMPARE and not (kind.kind == "b" and name not in ("eq", "ne")):
        if name == "ne" and kind.is_float:  # ordered: false for NaN, unlike numpy's
            return lambda a, b: (a < b) | (a > b)
        return _COMPARE[name]
    if kind.is_float:
        if name == "num":
            return lambda a, b: (a == a) & (b == b)
        if name == "nan":
            return lambda a, b: (a != a) | (b != b)
        if name.endswith("u") and name[:-1] in _COMPARE:
            ordered = _COMPARE[name[:-1]]
            return lambda a, b: ordered(a, b) | (a != a) | (b != b)
    raise form.unknown(f"comparison .{name} of .{kind.name}")


@opcode("setp")
def _setp(form: Form) -> Step:
    """setp.cmp[.and|.or|.xor]: compare, combine with a predicate; a second destination gets the combined opposite."""
    kind = form.type(BITS | INTEGERS | FLOATS)
    compare = _comparison(form.modifiers.pop(0) if form.modifiers else "", kind, form)
    combine = form.take("and", "or", "xor")
    form.count(3 if combine is None else 4)
    a, b = form.source(1, kind), form.source(2, kind)
    other = form.source(3, PRED) if combine else None
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[combine] if combine else None
    target = form.operands[0]
    pair = target if isinstance(target, syntax.Pair) else None
    write = form.write(pair.first if pair else target, PRED)
    write_opposite = form.write(pair.second, PRED) if pair else None

    def step(batch: Batch, lanes: Lanes) -> None:
        result = compare(a(batch, lanes), b(batch, lanes))
        opposite = ~result
        if function is not None and other is not None:
            with_ = other(batch, lanes)
            result, opposite = function(result, with_), function(opposite, with_)
        write(batch, lanes, result)
        if write_opposite is not None:
            write_opposite(batch, lanes, opposite)

    return step


@opcode("selp")
def _selp(form: Form) -> Step:
    """selp d, a, b, p: a where p, else b."""
    kind = form.type(BITS | INTEGERS | FLOATS)
    bits = TYPES[f"b{8 * kind.size}"]
    return form.compute(lambda a, b, p: np.where(p, a, b), bits, bits, bits, PRED)


@opcode("slct")
def _slct(form: Form) -> Step:
    """slct.dtype.s32|f32 d, a, b, c: a where c >= 0, else b (also for NaN)."""
    control = form.type({"s32", "f32"})
    bits = TYPES[f"b{8 * form.type(BITS | INTEGERS | FLOATS).size}"]
    return form.compute(lambda a, b, c: np.where(c >= 0, a, b), bits, bits, bits, control)


# ------------------------------------------------------------------------------------------------ moves, conversions
@opcode("mov")
def _mov(form: Form) -> Step:
    """mov: copy a register, special register, constant or address; pack into or unpack from a vector."""
    kind = form.type(BITS | INTEGERS | FLOATS | {"pred", "b128"})
    form.count(2)
    target, source = form.operands
    if isinstance(source, syntax.Vector):
        return _pack(form, kind, source)
    if isinstance(target, syntax.Vector):
        return _unpack(form, kind, target)
    read, write = form.source(1, kind), form.destination(0, kind)
    return lambda batch, lanes: write(batch, lanes, read(batch, lanes).copy())


def _part(form: Form, kind: PtxType, vector: syntax.Vector) -> PtxType:
    size, rest = divmod(kind.size, len(vector.items))
    if rest or size not in (1, 2, 4, 8):
        raise form.unknown(f"vector of {len(vector.items)}")
    return TYPES[f"b{8 * size}"]


def _pack(form: Form, kind: PtxType, vector: syntax.Vector) -> Step:
    part = _part(form, kind, vector)
    reads = [form.read(item, part) for item in vector.items]
    write = form.destination(0, kind)

    def step(batch: Batch, lanes: Lanes) -> None:
        parts = np.empty((lanes.count, len(reads)), part.dtype)
        for k, read in enumerate(reads):
            parts[:, k] = read(batch, lanes)
        write(batch, lanes, parts.view(kind.dtype)[:, 0].copy())

    return step


def _unpack(form: Form, kind: PtxType, vector: syntax.Vector) -> Step:
    part = _part(form, kind, vector)
    read = form.source(1, kind)
    writes = [form.write(item, part) for item in vector.items]

    def step(batch: Batch, lanes: Lanes) -> None:
        whole = np.full(lanes.count, read(batch, lanes))
        parts = whole.view(part.dtype).reshape(lanes.count, len(writes))
        for k, write in enumerate(writes):
            write(batch, lanes, parts[:, k].copy())

    return step


@opcode("cvt")
def _cvt(form: Form) -> Step:
    """cvt: between integer widths, integer and float, float widths; to packed pairs of bf16 or f16."""
    source = form.type(set(TYPES) - {"b8", "b16", "b32", "b64", "b128", "pred", "f16x2", "bf16x2"})
    result = form.type(set(TYPES) - {"b8", "b16", "b32", "b64", "b128", "pred"})
    if result.name in ("f16x2", "bf16x2"):
        form.need("rn")
        if source.name != "f32":
            raise form.unknown(f"packing of .{source.name}")
        narrow = floats.float32_to_bfloat16 if result.name == "bf16x2" else floats.float32_to_float16

        def pack(upper: Any, lower: Any) -> Any:
            high = np.atleast_1d(narrow(upper)).view(np.uint16).astype(np.uint32)
            return (high << np.uint32(16)) | np.atleast_1d(narrow(lower)).view(np.uint16)

        return form.compute(pack, result, source, source)
    return form.compute(_conversion(form, result, source), result, source)


def _conversion(form: Form, result: PtxType, source: PtxType) -> Callable[[Any], Any]:
    to_float, from_float = result.kind in "fx", source.kind in "fx"
    if not to_float and not from_float:
        # through the source's own signedness, so that a narrower signed source is sign-extended
        return lambda a: a.astype(result.dtype)
    if not to_float:
        rounding = form.need(*floats.INTEGRAL)
        widen = _to_float(source)
        return lambda a: floats.float_to_integer(widen(a), result.dtype, rounding)
    if not from_float:
        form.need("rn")
        if result.kind == "x" or result.size == 2:
            raise form.unknown("integer to half precision")
        return lambda a: a.astype(result.dtype)
    if result == source:
        integral = floats.INTEGRAL[form.need(*floats.INTEGRAL)]
        if source.kind == "x":
            raise form.unknown("integral bfloat16")
        return lambda a: floats.canonical(integral(a))
    widen = _to_float(source)
    if result.size > source.size:
        return lambda a: floats.canonical(widen(a).astype(result.dtype))
    form.need("rn")
    if result.name == "bf16":
        if source.size == 2:
            raise form.unknown("float16 to bfloat16")
        return floats.float64_to_bfloat16 if source.size == 8 else floats.float32_to_bfloat16
    return lambda a: floats.canonical(widen(a).astype(result.dtype))


def _to_float(source: PtxType) -> Callable[[Any], Any]:
    return floats.bfloat16_to_float32 if source.kind == "x" else lambda a: a
