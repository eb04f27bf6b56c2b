// CUDA on the host: enough of the device language to compile the kernel sources as C++20 under
// sanitizers.
//
// Compile with -DQGM_EMULATE_CUDA -I tests/cuda/emulation: this directory has headers named
// cuda_runtime.h, cuda_bf16.h and cuda_fp16.h that lead here. Kernels are called inside
// cuda_emulation::launch (fibers.h); `<<< >>>` is not available. `extern __shared__` arrays cannot
// be expressed in C++: the source declares them through a macro that is `T* name =
// cuda_emulation::dynamic_shared<T>()` here.
//
// 16-bit floats are storage only, as in the product: conversions, no arithmetic. Not covered:
// anything with a clock, a stream or a texture, and atomics on floats.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "fibers.h"

// ----------------------------------------------------------------------------------------
// qualifiers
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

#define threadIdx (::cuda_emulation::thread_index())
#define blockIdx (::cuda_emulation::block_index())
#define blockDim (::cuda_emulation::block_size())
#define gridDim (::cuda_emulation::grid_size())
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------- host
// types of signatures
using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

// ---------------------------------------------------------------------------------------- vector
// types
#define CUDA_EMULATION_VECTOR(type, name)                                                     \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_EMULATION_VECTOR(float, float)
CUDA_EMULATION_VECTOR(double, double)
CUDA_EMULATION_VECTOR(int, int)
CUDA_EMULATION_VECTOR(unsigned, uint)
CUDA_EMULATION_VECTOR(short, short)
CUDA_EMULATION_VECTOR(unsigned short, ushort)
CUDA_EMULATION_VECTOR(unsigned char, uchar)
CUDA_EMULATION_VECTOR(long long, longlong)
CUDA_EMULATION_VECTOR(unsigned long long, ulonglong)
#undef CUDA_EMULATION_VECTOR

// ----------------------------------------------------------------------------------------
// barriers, warp operations
inline void __syncthreads() { cuda_emulation::sync_threads(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_emulation::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_emulation {
// Lane that a shuffle reads within its segment of `width` lanes, or -1.
CUDA_EMULATION_INTERNAL inline int lane() { return static_cast<int>(self().linear % kWarp); }

template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  const int first = lane() / width * width;
  return exchange(mask, value, source, source >= first && source < first + width);
}
}  // namespace cuda_emulation

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() + static_cast<int>(delta), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() - static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return cuda_emulation::shuffle(mask, value, cuda_emulation::lane() ^ lanes, width);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = cuda_emulation::lane() / width * width;
  return cuda_emulation::shuffle(mask, value, first + source % width, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned result = 0;
  for (int k = 0; k < 32; ++k) {
    if ((mask >> k & 1) && cuda_emulation::exchange(mask, predicate != 0, k, true)) result |= 1u << k;
  }
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---------------------------------------------------------------------------------------- bits and
// arithmetic
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
using std::max;
using std::min;

// ---------------------------------------------------------------------------------------- loads
// and stores with hints
#define CUDA_EMULATION_LOAD(name) \
  template <class T>              \
  T name(const T* p) {            \
    return *p;                    \
  }
CUDA_EMULATION_LOAD(__ldg)
CUDA_EMULATION_LOAD(__ldca)
CUDA_EMULATION_LOAD(__ldcg)
CUDA_EMULATION_LOAD(__ldcs)
CUDA_EMULATION_LOAD(__ldcv)
CUDA_EMULATION_LOAD(__ldlu)
#undef CUDA_EMULATION_LOAD
#define CUDA_EMULATION_STORE(name) \
  template <class T>               \
  void name(T* p, T value) {       \
    *p = value;                    \
  }
CUDA_EMULATION_STORE(__stcg)
CUDA_EMULATION_STORE(__stcs)
CUDA_EMULATION_STORE(__stwb)
CUDA_EMULATION_STORE(__stwt)
#undef CUDA_EMULATION_STORE

// ---------------------------------------------------------------------------------------- integer
// atomics
template <class T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "floating-point atomics depend on thread order");
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* p, T value) {
  return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// ---------------------------------------------------------------------------------------- 16-bit
// floats
struct __nv_bfloat16 {
  unsigned short bits;
};
struct __half {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned{value.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return value.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned short sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  const float magnitude = __uint_as_float(bits & 0x7fffffffu);
  if (std::isnan(magnitude)) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};  // 65504 plus half a unit
  // units of the last place that the result has; 2^-24 for subnormals. nearbyint rounds ties to
  // even.
  const int exponent = std::max(magnitude == 0.0f ? -14 : std::ilogb(magnitude), -14);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  const int biased = units < 1024 ? units : (exponent + 15) * 1024 + units - 1024;  // a carry moves on by itself
  return {static_cast<unsigned short>(sign | biased)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
