"""Integer and bit instructions, comparison and selection of the PTX machine against Python integers and numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ptx import MachineFault
from ptx.types import TYPES
from ptx_snippets import bits, evaluate
from ptx_values import INTEGER_NAMES, assert_same, by_python, integers, numbers, pairs


# ------------------------------------------------------------------------------------------------ integer arithmetic
@pytest.mark.parametrize("kind", INTEGER_NAMES)
@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
    ],
)
def test_integer_arithmetic_wraps_like_exact_integers(
    opcode: str, function: Callable[[int, int], int], kind: str
) -> None:
    a, b = pairs(integers, kind, 1)
    got = evaluate(f"{opcode}.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b))
    assert_same(got, by_python(function, kind, a, b))


@pytest.mark.parametrize("kind", INTEGER_NAMES)
def test_mul_hi_is_the_upper_half_of_the_exact_product(kind: str) -> None:
    a, b = pairs(integers, kind, 2)
    got = evaluate(f"mul.hi.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b))
    assert_same(got, by_python(lambda x, y: (x * y) >> (8 * TYPES[kind].size), kind, a, b))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products_keep_every_bit(kind: str) -> None:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    a, b = pairs(integers, kind, 3)
    c = np.resize(integers(wide, 4), len(a))
    assert_same(evaluate(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", wide, (kind, a), (kind, b)),
                by_python(lambda x, y: x * y, wide, a, b))  # fmt: skip
    got = evaluate(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};", wide, (kind, a), (kind, b), (wide, c))
    assert_same(got, by_python(lambda x, y, z: x * y + z, wide, a, b, c))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_mad_lo_adds_after_the_product(kind: str) -> None:
    a, b = pairs(integers, kind, 5)
    c = np.resize(integers(kind, 6), len(a))
    got = evaluate(f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, (kind, a), (kind, b), (kind, c))
    assert_same(got, by_python(lambda x, y, z: x * y + z, kind, a, b, c))


@pytest.mark.parametrize("kind", INTEGER_NAMES)
def test_division_truncates_toward_zero(kind: str) -> None:
    a, b = pairs(integers, kind, 7)
    a, b = a[b != 0], b[b != 0]

    def quotient(x: int, y: int) -> int:
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    assert_same(
        evaluate(f"div.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b)), by_python(quotient, kind, a, b)
    )
    got = evaluate(f"rem.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), (kind, b))
    assert_same(got, by_python(lambda x, y: x - y * quotient(x, y), kind, a, b))


def test_division_by_zero_is_a_fault() -> None:
    with pytest.raises(MachineFault, match="division by zero"):
        evaluate("div.u32 {d}, {a}, {b};", "u32", ("u32", [4, 5]), ("u32", [1, 0]))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_integer_abs_and_neg_wrap(kind: str) -> None:
    a = integers(kind, 8)
    assert_same(evaluate(f"abs.{kind} {{d}}, {{a}};", kind, (kind, a)), by_python(abs, kind, a))
    assert_same(evaluate(f"neg.{kind} {{d}}, {{a}};", kind, (kind, a)), by_python(lambda x: -x, kind, a))


# ------------------------------------------------------------------------------------------------ bits
@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic_works_on_all_bits(kind: str) -> None:
    unsigned = f"u{kind[1:]}"
    a, b = pairs(integers, unsigned, 9)
    for opcode, expected in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        assert_same(evaluate(f"{opcode}.{kind} {{d}}, {{a}}, {{b}};", unsigned, (unsigned, a), (unsigned, b)), expected)
    assert_same(evaluate(f"not.{kind} {{d}}, {{a}};", unsigned, (unsigned, a)), ~a)
    assert_same(evaluate(f"cnot.{kind} {{d}}, {{a}};", unsigned, (unsigned, a)), (a == 0).astype(a.dtype))


@pytest.mark.parametrize("kind", INTEGER_NAMES)
def test_shifts_beyond_the_width_give_zero_or_sign(kind: str) -> None:
    width = 8 * TYPES[kind].size
    amounts = np.array([0, 1, 5, width - 1, width, width + 1, 200, 2**31, 2**32 - 1], np.uint32)
    a, n = (v.ravel() for v in np.meshgrid(integers(kind, 10, 40), amounts))
    right = evaluate(f"shr.{kind} {{d}}, {{a}}, {{b}};", kind, (kind, a), ("u32", n))
    assert_same(right, by_python(lambda x, s: x >> s, kind, a, n))
    left = evaluate(f"shl.b{width} {{d}}, {{a}}, {{b}};", kind, (kind, a), ("u32", n))
    assert_same(left, by_python(lambda x, s: x << s if s < width else 0, kind, a, n))


def test_funnel_shift_takes_32_bits_of_a_pair() -> None:
    low, high = pairs(integers, "u32", 11)
    n = np.resize(np.array([0, 1, 13, 31, 32, 33, 63, 64, 2**32 - 1], np.uint32), len(low))
    operands = (("u32", low), ("u32", high), ("u32", n))
    for mode, limit in (("wrap", lambda s: s & 31), ("clamp", lambda s: min(s, 32))):
        left = evaluate(f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", "u32", *operands)
        assert_same(left, by_python(lambda lo, hi, s: ((hi << 32 | lo) << limit(s)) >> 32, "u32", low, high, n))  # noqa: B023
        right = evaluate(f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", "u32", *operands)
        assert_same(right, by_python(lambda lo, hi, s: (hi << 32 | lo) >> limit(s), "u32", low, high, n))  # noqa: B023


@pytest.mark.parametrize("table", [0x00, 0x01, 0x3C, 0x80, 0x96, 0xE8, 0xEA, 0xF0, 0xFF])
def test_lop3_follows_its_truth_table(table: int) -> None:
    a, b = pairs(integers, "u32", 12)
    c = a[::-1].copy()
    got = evaluate(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", "u32", ("u32", a), ("u32", b), ("u32", c))

    def lookup(x: int, y: int, z: int) -> int:
        return sum((table >> ((x >> k & 1) << 2 | (y >> k & 1) << 1 | (z >> k & 1)) & 1) << k for k in range(32))

    assert_same(got, by_python(lookup, "u32", a, b, c))


def test_prmt_picks_bytes_and_signs() -> None:
    a, b = pairs(integers, "u32", 13)
    selector = np.resize(integers("u32", 14), len(a))

    def pick(x: int, y: int, s: int) -> int:
        pair, result = (y << 32 | x).to_bytes(8, "little"), 0
        for k in range(4):
            nibble = s >> 4 * k & 15
            byte = pair[nibble & 7]
            result |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * k
        return result

    got = evaluate("prmt.b32 {d}, {a}, {b}, {c};", "u32", ("u32", a), ("u32", b), ("u32", selector))
    assert_same(got, by_python(pick, "u32", a, b, selector))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind: str) -> None:
    width = 8 * TYPES[kind].size
    a = integers(kind, 15)
    rng = np.random.default_rng(16)
    position = rng.choice([0, 1, 8, width - 1, width, 255, 300], len(a)).astype(np.uint32)
    length = rng.choice([0, 1, 7, 16, width - 1, width, 255], len(a)).astype(np.uint32)

    def extract(x: int, p: int, n: int) -> int:
        p, n, x = p & 255, n & 255, x & (1 << width) - 1
        sign = x >> min(p + n - 1, width - 1) & 1 if kind[0] == "s" and n else 0
        return sum((x >> (p + k) & 1 if k < n and p + k < width else sign) << k for k in range(width))

    got = evaluate(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, (kind, a), ("u32", position), ("u32", length))
    assert_same(got, by_python(extract, kind, a, position, length))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bit_field_insert(kind: str) -> None:
    width, unsigned = int(kind[1:]), f"u{kind[1:]}"
    a, b = pairs(integers, unsigned, 17)
    rng = np.random.default_rng(18)
    position = rng.choice([0, 1, 8, width - 1, width, 255], len(a)).astype(np.uint32)
    length = rng.choice([0, 1, 7, 16, width, 255], len(a)).astype(np.uint32)

    def insert(x: int, y: int, p: int, n: int) -> int:
        mask = ((1 << n) - 1) << p & (1 << width) - 1
        return y & ~mask | x << p & mask

    operands = ((unsigned, a), (unsigned, b), ("u32", position), ("u32", length))
    got = evaluate(f"bfi.{kind} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", unsigned, *operands)
    assert_same(got, by_python(insert, unsigned, a, b, position, length))


@pytest.mark.parametrize("width", [32, 64])
def test_bit_counting(width: int) -> None:
    kind = f"u{width}"
    a = integers(kind, 19)
    source = (kind, a)
    assert_same(evaluate(f"popc.b{width} {{d}}, {{a}};", "u32", source), by_python(lambda x: x.bit_count(), "u32", a))
    clz = by_python(lambda x: width - x.bit_length(), "u32", a)
    assert_same(evaluate(f"clz.b{width} {{d}}, {{a}};", "u32", source), clz)
    reverse = by_python(lambda x: int(f"{x:0{width}b}"[::-1], 2), kind, a)
    assert_same(evaluate(f"brev.b{width} {{d}}, {{a}};", kind, source), reverse)
    find = by_python(lambda x: x.bit_length() - 1, "u32", a)
    assert_same(evaluate(f"bfind.{kind} {{d}}, {{a}};", "u32", source), find)
    shift = by_python(lambda x: width - x.bit_length() if x else -1, "u32", a)
    assert_same(evaluate(f"bfind.shiftamt.{kind} {{d}}, {{a}};", "u32", source), shift)


# ------------------------------------------------------------------------------------------------ comparison, selection
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("name", list(COMPARISONS))
def test_setp_compares_integers(name: str) -> None:
    for kind in ("u16", "s32", "u64", "s64"):
        a, b = pairs(integers, kind, 27)
        b[::3] = a[::3]
        got = evaluate(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}};", "pred", (kind, a), (kind, b))
        assert_same(got, COMPARISONS[name](a, b))


@pytest.mark.parametrize("name", list(COMPARISONS))
def test_setp_orders_floats_and_treats_nan_as_told(name: str) -> None:
    a, b = pairs(numbers, "f32", 28)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    ordered = COMPARISONS[name](a, b) & ~nan
    operands = (("f32", a), ("f32", b))
    assert_same(evaluate(f"setp.{name}.f32 {{d}}, {{a}}, {{b}};", "pred", *operands), ordered)
    assert_same(evaluate(f"setp.{name}u.f32 {{d}}, {{a}}, {{b}};", "pred", *operands), ordered | nan)
    assert_same(evaluate("setp.num.f32 {d}, {a}, {b};", "pred", *operands), ~nan)
    assert_same(evaluate("setp.nan.f32 {d}, {a}, {b};", "pred", *operands), nan)


def test_setp_combines_with_a_predicate_and_gives_the_opposite() -> None:
    a, b = pairs(integers, "s32", 29)
    c = np.resize(np.array([0, 1], np.uint32), len(a))
    operands = (("s32", a), ("s32", b), ("u32", c))
    less, flag = a < b, c != 0
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        code = f"setp.ne.u32 %p1, {{c}}, 0; setp.lt.{name}.s32 {{d}}|%p2, {{a}}, {{b}}, %p1;"
        assert_same(evaluate(code, "pred", *operands), function(less, flag))
        assert_same(evaluate(code + " mov.pred {d}, %p2;", "pred", *operands), function(~less, flag))
        negated = code.replace(", %p1;", ", !%p1;")
        assert_same(evaluate(negated, "pred", *operands), function(less, ~flag))


def test_selection_follows_predicate_and_sign() -> None:
    a, b = pairs(numbers, "f32", 30)
    c = np.resize(integers("s32", 31), len(a))
    picked = evaluate(
        "setp.gt.s32 %p1, {c}, 5; selp.f32 {d}, {a}, {b}, %p1;", "f32", ("f32", a), ("f32", b), ("s32", c)
    )
    np.testing.assert_array_equal(bits(picked), bits(np.where(c > 5, a, b)))
    by_sign = evaluate("slct.f32.s32 {d}, {a}, {b}, {c};", "f32", ("f32", a), ("f32", b), ("s32", c))
    np.testing.assert_array_equal(bits(by_sign), bits(np.where(c >= 0, a, b)))
    constants = evaluate("setp.gt.s32 %p1, {a}, 5; selp.f32 {d}, 0f3F800000, 0fC0000000, %p1;", "f32", ("s32", c))
    np.testing.assert_array_equal(constants, np.where(c > 5, np.float32(1), np.float32(-2)))
