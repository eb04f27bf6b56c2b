"""Floating-point, conversion and move instructions of the PTX machine against numpy, libm and exact search."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptx import UnknownInstruction
from ptx.types import TYPES, Array
from ptx_snippets import bits, evaluate
from ptx_values import INTEGER_NAMES, assert_same, by_python, integers, numbers, pairs


# ------------------------------------------------------------------------------------------------ floating point
@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize(
    ("opcode", "function"),
    [("add.rn", np.add), ("sub.rn", np.subtract), ("mul.rn", np.multiply), ("div.rn", np.divide)],
)
def test_float_arithmetic_is_correctly_rounded(opcode: str, function: Callable[..., Array], kind: str) -> None:
    a, b = pairs(numbers, kind, 20)
    with np.errstate(all="ignore"):
        expected = function(a, b)
    assert_same(evaluate(f"{opcode}.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b)), expected)


def test_float32_arithmetic_agrees_with_rounding_the_exact_result() -> None:
    """An independent check of numpy itself: float64 holds sums and products of float32 well enough to round once."""
    a, b = pairs(numbers, "f32", 21)
    with np.errstate(all="ignore"):
        product = (a.astype(np.float64) * b.astype(np.float64)).astype(np.float32)
    assert_same(evaluate("mul.rn.f32 {d}, {a}, {b};", "f32", ("f32", a), ("f32", b)), product)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_sqrt_and_reciprocal_are_correctly_rounded(kind: str) -> None:
    a = numbers(kind, 22)
    with np.errstate(all="ignore"):
        assert_same(evaluate(f"sqrt.rn.{kind} {{d}}, {{a}};", kind, (kind, a)), np.sqrt(a))
        assert_same(evaluate(f"rcp.rn.{kind} {{d}}, {{a}};", kind, (kind, a)), np.divide(a.dtype.type(1), a))


def test_fma_agrees_with_the_c_library() -> None:
    """libm's fma and fmaf are exact by the C standard."""
    libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    for kind, name, ctype in (("f32", "fmaf", ctypes.c_float), ("f64", "fma", ctypes.c_double)):
        function = getattr(libm, name)
        function.argtypes, function.restype = [ctype] * 3, ctype
        a, b = pairs(numbers, kind, 23)
        c = np.resize(numbers(kind, 24), len(a))
        # products next to the addend, where one rounding and two differ
        with np.errstate(all="ignore"):
            c[::2] = -(a[::2] * b[::2])
        expected = np.array([function(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], a.dtype)
        got = evaluate(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, (kind, a), (kind, b), (kind, c))
        assert_same(got, expected)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_float_min_max_prefer_numbers_and_order_zeros(kind: str) -> None:
    a, b = pairs(numbers, kind, 25)

    def pick(x: float, y: float, sign: int) -> float:
        if math.isnan(x) or math.isnan(y):
            return y if math.isnan(x) else x
        return min(x, y, key=lambda v: (sign * v, sign * math.copysign(1, v)))

    for opcode, sign in (("min", 1), ("max", -1)):
        expected = np.array([pick(x, y, sign) for x, y in zip(a.tolist(), b.tolist(), strict=True)], a.dtype)
        assert_same(evaluate(f"{opcode}.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b)), expected)
        nan = np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), expected)
        assert_same(evaluate(f"{opcode}.NaN.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b)), nan)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_float_signs_and_classes(kind: str) -> None:
    a, b = pairs(numbers, kind, 26)
    with np.errstate(all="ignore"):
        assert_same(evaluate(f"abs.{kind} {{d}}, {{a}};", kind, (kind, a)), np.abs(a))
        assert_same(evaluate(f"neg.{kind} {{d}}, {{a}};", kind, (kind, a)), -a)
    signed = evaluate(f"copysign.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b))
    np.testing.assert_array_equal(bits(signed), bits(np.copysign(b, a)))
    classes: dict[str, Any] = {"finite": np.isfinite(a), "infinite": np.isinf(a), "notanumber": np.isnan(a)}
    classes["number"] = ~classes["notanumber"]
    classes["subnormal"] = (np.abs(a) < np.finfo(a.dtype).tiny) & (a != 0)
    for name, expected in classes.items():
        assert_same(evaluate(f"testp.{name}.{kind} {{d}}, {{a}};", "pred", (kind, a)), expected)


# ------------------------------------------------------------------------------------------------ conversion, moves
@pytest.mark.parametrize("source", ["s8", "u8", *INTEGER_NAMES])
def test_cvt_between_integers_extends_by_the_source_sign(source: str) -> None:
    a = integers(source, 32)
    for result in INTEGER_NAMES:
        got = evaluate(f"cvt.{result}.{source} {{d}}, {{a}};", result, (source, a))
        assert_same(got, by_python(lambda x: x, result, a))


@pytest.mark.parametrize("source", ["u32", "s32", "u64", "s64"])
def test_cvt_integer_to_float_rounds_to_nearest(source: str) -> None:
    a = integers(source, 33)
    assert_same(
        evaluate(f"cvt.rn.f64.{source} {{d}}, {{a}};", "f64", (source, a)), np.array([float(int(v)) for v in a])
    )
    got = evaluate(f"cvt.rn.f32.{source} {{d}}, {{a}};", "f32", (source, a)).astype(np.float64)
    for value, single in zip(a.tolist(), got.tolist(), strict=True):
        spacing = math.ulp(single) * 2**29 if single else 0  # of float32
        assert abs(int(single) - value) * 2 <= spacing


@pytest.mark.parametrize("result", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_cvt_float_to_integer_rounds_and_clamps(source: str, result: str) -> None:
    a = np.concatenate(
        [numbers(source, 34), np.array([2**31, 2**32, 2.0**63, 2.0**64, -(2.0**63)], TYPES[source].dtype)]
    )
    info = np.iinfo(TYPES[result].dtype)
    rounders: dict[str, Callable[[float], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, function in rounders.items():
        nan = info.min if info.min else info.max // 2 + 1
        if source == "f32" and info.bits == 32:
            nan = 0

        def exact(x: float, function: Callable[[float], int] = function, nan: int = nan) -> int:
            if math.isnan(x):
                return nan
            if math.isinf(x):
                return info.max if x > 0 else info.min
            return min(max(function(x), info.min), info.max)

        expected = np.array([exact(x) for x in a.tolist()], info.dtype)
        assert_same(evaluate(f"cvt.{mode}.{result}.{source} {{d}}, {{a}};", result, (source, a)), expected)


def nearest_half(value: float, kind: str) -> int:
    """Bits of the 16-bit float next to ``value``, ties to even, by search over all of them."""
    if math.isnan(value):
        return 0x7FFF
    table = HALF_VALUES[kind]
    magnitude = abs(value)
    k = int(np.searchsorted(table, magnitude))
    best = min((abs(float(table[j]) - magnitude), j & 1, j) for j in (k - 1, k) if 0 <= j < len(table))[2]
    return best | (0x8000 if math.copysign(1, value) < 0 else 0)


def _half_values(kind: str) -> Array:
    """All non-negative finite values in order; then 2^emax, which stands for infinity when rounding."""
    if kind == "f16":
        finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
        return np.append(finite, 2.0**16)
    finite = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.append(finite, 2.0**128)


HALF_VALUES = {kind: _half_values(kind) for kind in ("f16", "bf16")}


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_cvt_to_16_bits_rounds_to_nearest_even(kind: str, source: str) -> None:
    table = HALF_VALUES[kind]
    rng = np.random.default_rng(35)
    k = rng.integers(0, len(table) - 1, 300)
    middle = (table[k] + table[k + 1]) / 2  # ties, exact in float32
    with np.errstate(all="ignore"):
        a = np.concatenate([numbers(source, 36), middle, -middle, table[k], table[-1:] * 0.9999]).astype(
            TYPES[source].dtype
        )
        a = np.concatenate([a, np.nextafter(a, np.inf, dtype=a.dtype), np.nextafter(a, -np.inf, dtype=a.dtype)])
    got = evaluate(f"cvt.rn.{kind}.{source} {{d}}, {{a}};", "u16", (source, a))
    expected = np.array(
        [nearest_half(v, kind) if not math.isinf(v) else (0x8000 if v < 0 else 0) | len(table) - 1 for v in a.tolist()]
    )
    np.testing.assert_array_equal(got, expected.astype(np.uint16))


def test_cvt_from_16_bits_is_exact() -> None:
    patterns = np.arange(0, 65536, 7, dtype=np.uint16)
    with np.errstate(all="ignore"):
        assert_same(
            evaluate("cvt.f32.f16 {d}, {a};", "f32", ("u16", patterns)), patterns.view(np.float16).astype(np.float32)
        )
        assert_same(
            evaluate("cvt.f64.f16 {d}, {a};", "f64", ("u16", patterns)), patterns.view(np.float16).astype(np.float64)
        )
    widened = (patterns.astype(np.uint32) << 16).view(np.float32)
    assert_same(evaluate("cvt.f32.bf16 {d}, {a};", "f32", ("u16", patterns)), widened)
    shifted = evaluate("mov.b32 {d}, {{0, {a}}};", "u32", ("u16", patterns))
    np.testing.assert_array_equal(shifted, patterns.astype(np.uint32) << 16)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_cvt_packs_the_first_source_into_the_upper_half(kind: str) -> None:
    a, b = pairs(numbers, "f32", 37)
    got = evaluate(f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}};", "u32", ("f32", a), ("f32", b))
    upper = evaluate(f"cvt.rn.{kind}.f32 {{d}}, {{a}};", "u16", ("f32", a))
    lower = evaluate(f"cvt.rn.{kind}.f32 {{d}}, {{a}};", "u16", ("f32", b))
    np.testing.assert_array_equal(got, upper.astype(np.uint32) << 16 | lower)


def test_cvt_between_float_widths_and_to_integral_values() -> None:
    a, b = numbers("f32", 38), numbers("f64", 39)
    with np.errstate(all="ignore"):
        assert_same(evaluate("cvt.f64.f32 {d}, {a};", "f64", ("f32", a)), a.astype(np.float64))
        assert_same(evaluate("cvt.rn.f32.f64 {d}, {a};", "f32", ("f64", b)), b.astype(np.float32))
        for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            assert_same(evaluate(f"cvt.{mode}.f32.f32 {{d}}, {{a}};", "f32", ("f32", a)), function(a))


def test_moves_pack_unpack_and_copy() -> None:
    a, b = pairs(integers, "u32", 40)
    packed = evaluate("mov.b64 {d}, {{{a}, {b}}};", "u64", ("u32", a), ("u32", b))
    np.testing.assert_array_equal(packed, b.astype(np.uint64) << 32 | a)
    unpacked = evaluate("mov.b64 {{_, {d}}}, {a};", "u32", ("u64", packed))
    np.testing.assert_array_equal(unpacked, b)
    halves = evaluate("mov.b32 {{%h1, %h2}}, {a}; mov.b32 {d}, {{%h2, %h1}};", "u32", ("u32", a))
    np.testing.assert_array_equal(halves, a << 16 | a >> 16)
    # a copy is a copy: changing one register later, in some lanes only, leaves the other alone
    code = "mov.u32 %r9, {a}; and.b32 %r8, {a}, 1; setp.eq.u32 %p1, %r8, 0; @%p1 mov.u32 %r9, 7; mov.u32 {d}, {a};"
    np.testing.assert_array_equal(evaluate(code, "u32", ("u32", a)), a)


# ------------------------------------------------------------------------------------------------ what is not known
@pytest.mark.parametrize(
    "code",
    [
        "ex2.approx.f32 {d}, {a};",
        "add.rz.f32 {d}, {a}, {a};",
        "add.ftz.f32 {d}, {a}, {a};",
        "mul.sat.f32 {d}, {a}, {a};",
        "div.approx.f32 {d}, {a}, {a};",
        "div.full.f32 {d}, {a}, {a};",
        "sqrt.approx.f32 {d}, {a};",
        "fma.rm.f32 {d}, {a}, {a}, {a};",
        "add.f16 %h1, %h2, %h3;",
        "cvt.rn.satfinite.bf16.f32 %h1, {a};",
        "cvt.rz.bf16.f32 %h1, {a};",
        "setp.lo.s32 %p1, {a}, {a};",
        "atom.global.add.f32 {d}, [%d11], {a};",
        "bar.sync 0, 32;",
        "mov.f32 {d}, %clock;",
        "wgmma.fence.sync.aligned;",
    ],
)
def test_unknown_opcodes_modifiers_and_types_are_errors(code: str) -> None:
    with pytest.raises(
        (UnknownInstruction, ValueError), match=r"unknown|not known|operand not understood|PTX line|barriers"
    ):
        evaluate(code, "f32", ("f32", np.ones(1, np.float32)))
