"""Floating point exactly as PTX rounds it: conversions, fused multiply-add, minimum and maximum.

numpy's float32 and float64 add, subtract, multiply, divide and square root are IEEE round-to-nearest-even with
subnormals, as PTX .rn without .ftz; here is what numpy lacks. PTX returns one canonical NaN for float32 results
(0x7fffffff), where the CPU keeps the operand's payload; ``canonical`` applies it. float64 NaN payloads are the CPU's.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from .types import Array

NAN32 = np.uint32(0x7FFFFFFF)
NAN16 = np.uint16(0x7FFF)  # float16 and bfloat16


def canonical(value: Array) -> Array:
    """Replace every float32 or float16 NaN by PTX's; float64 is returned as it is."""
    if value.dtype.itemsize == 8:
        return value
    bad = value != value
    if not bad.any():
        return value
    if value.dtype.itemsize == 4:
        result: Array = np.where(bad, NAN32, value.view(np.uint32)).view(np.float32)
    else:
        result = np.where(bad, NAN16, value.view(np.uint16)).view(np.float16)
    return result


def bfloat16_to_float32(bits: Array) -> Array:
    """Exact; NaN stays NaN with its payload (a shift, as nvcc writes it for every architecture)."""
    result: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return result


def float32_to_bfloat16(value: Array) -> Array:
    """Round to nearest even; bits as uint16, NaN as 0x7fff."""
    bits = value.view(np.uint32)
    # add half a unit in the last kept place, minus one where that place is even; a carry may reach infinity, as it must
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    result: Array = np.where(value != value, NAN16, rounded.astype(np.uint16))
    return result


def float64_to_bfloat16(value: Array) -> Array:
    """Round once, to nearest even: through float32 rounded to odd, which keeps what the second rounding needs."""
    return float32_to_bfloat16(_float32_round_to_odd(value))


def _float32_round_to_odd(value: Array) -> Array:
    """float64 -> float32: exact values stay, others go to the neighbour whose last bit is 1."""
    nearest = value.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    toward_zero = np.where(np.abs(back) > np.abs(value), bits - np.uint32(1), bits)
    odd = (toward_zero | np.uint32(1)).view(np.float32)
    result: Array = np.where((back == value) | (value != value), nearest, odd)
    return result


def float32_to_float16(value: Array) -> Array:
    """Round to nearest even, subnormals and overflow included; NaN as 0x7fff. Also takes float64, rounding once."""
    return canonical(value.astype(np.float16))


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c with one rounding to nearest even, for float32 or float64."""
    return fma32(a, b, c) if a.dtype == np.float32 else fma64(a, b, c)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """float32: the product is exact in float64, and the sum rounded to odd there survives the rounding to float32.

    Source: Boldo, Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd"
    (2008); 53 >= 24 + 2 bits makes the second rounding right, for subnormal results too.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    # TwoSum: error is exactly what the addition rounded away
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)
    bits = np.where(inexact, np.where(away, bits + 1, bits - 1), bits)
    result: Array = bits.view(np.float64).astype(np.float32)
    return result


def fma64(a: Array, b: Array, c: Array) -> Array:
    """float64: exact rational arithmetic, lane by lane. Slow; kernels built with --fmad=false have no float64 fma."""
    a, b, c = np.broadcast_arrays(a, b, c)
    # infinities and NaN; a finite product that overflows must not meet an infinite addend
    result = np.where(np.isfinite(a) & np.isfinite(b) & ~np.isfinite(c), c, a * b + c)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    for k in np.flatnonzero(finite):
        exact = Fraction(float(a[k])) * Fraction(float(b[k])) + Fraction(float(c[k]))
        if exact:
            result[k] = _round_fraction(exact)
        elif float(a[k]) != 0 and float(b[k]) != 0:
            result[k] = 0.0  # exact cancellation gives +0
    answer: Array = result
    return answer


def _round_fraction(exact: Fraction) -> float:
    """Nearest float64, infinity where it overflows (Python's division of integers rounds to nearest even)."""
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def minimum(a: Array, b: Array) -> Array:
    """PTX min: the other operand where one is NaN, and -0 below +0."""
    result: Array = np.where((a < b) | (b != b) | ((a == b) & np.signbit(a)), a, b)
    return canonical(result)


def maximum(a: Array, b: Array) -> Array:
    """PTX max: the other operand where one is NaN, and +0 above -0."""
    result: Array = np.where((a > b) | (b != b) | ((a == b) & ~np.signbit(a)), a, b)
    return canonical(result)


#: cvt to an integral value: nearest even, toward zero, down, up.
INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def float_to_integer(value: Array, dtype: np.dtype[np.generic], rounding: str) -> Array:
    """Round to an integral value, then clamp to the range of ``dtype``.

    NaN gives 0, or the top bit alone where source or result has 64 bits (PTX ISA, cvt).
    """
    integral = INTEGRAL[rounding](value.astype(np.float64))
    info = np.iinfo(dtype)  # type: ignore[type-var]
    # both bounds are exact float64 numbers: the lower is 0 or a power of two, the upper one is a power of two
    below, above = integral < float(info.min), integral >= float(info.max) + (1.0 if dtype.itemsize < 8 else 0.0)
    inside = np.where(below | above | (value != value), 0.0, integral)
    result = inside.astype(dtype)
    result = np.where(below, dtype.type(info.min), result)
    result = np.where(above, dtype.type(info.max), result)
    wide = value.dtype.itemsize == 8 or dtype.itemsize == 8
    nan = np.uint64(1 << (8 * dtype.itemsize - 1)).astype(dtype) if wide else dtype.type(0)
    answer: Array = np.where(value != value, nan, result)
    return answer
