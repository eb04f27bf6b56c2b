// Storage types and their conversion to the type that the arithmetic runs in.
//
// float32, bfloat16 and float16 compute in float, float64 in double; a value is rounded once, when it
// is stored (round to nearest, ties to even). The 16-bit conversions are integer code without
// branches: the vectoriser takes them at every SIMD level and the bits are the same on CPU and GPU.
// NaN becomes the quiet NaN that PyTorch writes.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace qgm {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <class Storage>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class Storage>
using Compute = typename ComputeOf<Storage>::type;

QGM_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

QGM_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

QGM_HD float widen(float value) { return value; }
QGM_HD double widen(double value) { return value; }

QGM_HD float widen(bfloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

QGM_HD float widen(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // Re-bias 15 -> 127; infinities and NaN move on to the all-ones exponent.
  const uint32_t rebias = 112u << 23;
  const uint32_t normal = magnitude + rebias + (exponent == 0x0f800000u ? rebias : 0u);
  // Subnormals: put the mantissa under the exponent of 2^-14, then take the implicit one away.
  const float subnormal = float_from_bits(magnitude + (113u << 23)) - float_from_bits(113u << 23);
  const uint32_t result = exponent == 0u ? float_bits(subnormal) : normal;
  return float_from_bits(result | sign);
}

template <class Storage>
QGM_HD Storage narrow(Compute<Storage> value);

template <>
QGM_HD float narrow<float>(float value) {
  return value;
}

template <>
QGM_HD double narrow<double>(double value) {
  return value;
}

template <>
QGM_HD bfloat16 narrow<bfloat16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {uint16_t(is_nan ? 0x7fc0u : rounded)};
}

template <>
QGM_HD float16 narrow<float16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal range: re-bias 127 -> 15 and round at bit 13.
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  // Below 2^-14: adding 0.5 aligns the mantissa at 2^-24 and rounds it in hardware.
  const uint32_t half_bits = 126u << 23;
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + float_from_bits(half_bits)) - half_bits;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;  // 65536 and above: infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
  return {uint16_t(result | sign)};
}

// Correctly rounded on every device, as IEEE 754 asks (nvcc: -prec-sqrt=true).
QGM_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

QGM_HD double square_root(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#else
  return __builtin_sqrt(value);
#endif
}

template <class T>
QGM_HD T larger(T a, T b) {
  return a > b ? a : b;
}

// N values of one coordinate; unlike a plain array, N may be 0.
template <class T, int N>
struct Values {
  T data[N > 0 ? N : 1];
  QGM_HD T& operator[](int k) { return data[k]; }
  QGM_HD const T& operator[](int k) const { return data[k]; }
};

}  // namespace qgm
