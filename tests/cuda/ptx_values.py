"""Operand values for the tests of the PTX machine, and exact comparison of results. Holds no test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.types import TYPES, Array
from ptx_snippets import bits

INTEGER_NAMES = ["u16", "s16", "u32", "s32", "u64", "s64"]


def integers(kind: str, seed: int, count: int = 300) -> Array:
    """Random values of every magnitude, and the extremes."""
    info = np.iinfo(TYPES[kind].dtype)
    rng = np.random.default_rng(seed)
    wide = [int.from_bytes(rng.bytes(8), "little") >> int(rng.integers(0, 64)) for _ in range(count)]
    mask = (1 << info.bits) - 1
    special = [0, 1, 2, 3, 7, 31, 32, info.max, info.max - 1, info.min, info.min + 1, -1]
    raw = [v & mask for v in special + wide]
    return np.array(raw, f"u{info.bits // 8}").view(TYPES[kind].dtype)


def numbers(kind: str, seed: int, count: int = 400) -> Array:
    """Random bit patterns (all exponents, subnormals, NaNs, infinities), moderate values, and special ones."""
    dtype = TYPES[kind].dtype
    rng = np.random.default_rng(seed)
    pattern = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype)
    moderate = rng.standard_normal(count).astype(dtype)
    info = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, info.max, -info.max, info.tiny, info.smallest_subnormal]
    with np.errstate(all="ignore"):
        return np.concatenate([np.array([*special, 0.5, 1.5, 2.5, -2.5, 3.0], dtype), pattern, moderate])


def pairs(make: Callable[[str, int], Array], kind: str, seed: int) -> tuple[Array, Array]:
    """Values against shuffled values, the special ones against each other."""
    a, b = make(kind, seed), make(kind, seed + 1)
    a_head, b_head = np.meshgrid(a[:16], b[:16])
    rng = np.random.default_rng(seed)
    return np.concatenate([a_head.ravel(), a]), np.concatenate([b_head.ravel(), rng.permutation(b)])


def assert_same(got: Array, expected: Array) -> None:
    """Equal bits, any NaN equal to any NaN of a float64, and float32 NaNs canonical."""
    expected = np.asarray(expected).astype(got.dtype, copy=False)
    nan = expected != expected
    if got.dtype == np.float32:
        assert (bits(got)[nan] == 0x7FFFFFFF).all()
    if got.dtype == np.float16:
        assert (bits(got)[nan] == 0x7FFF).all()
    assert (got[nan] != got[nan]).all()
    np.testing.assert_array_equal(bits(got)[~nan], bits(expected)[~nan])


def wrap(value: int, kind: str) -> int:
    width = 8 * TYPES[kind].size
    value &= (1 << width) - 1
    return value - (1 << width) if TYPES[kind].is_signed and value >> (width - 1) else value


def by_python(function: Callable[..., int], kind: str, *operands: Array) -> Array:
    """Apply exact integer arithmetic element by element, wrapped to the type."""
    rows = zip(*[o.tolist() for o in operands], strict=True)
    return np.array([wrap(function(*row), kind) for row in rows], TYPES[kind].dtype)
