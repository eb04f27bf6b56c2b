// Rows as they are stored, and as the rules see them.
//
// Rules run on rows of float or double. float32 and float64 rows are used where they lie; rows of 16-bit
// numbers are widened into a tile of floats, stepped there and narrowed back, each number once. So no
// rule is compiled for a 16-bit type, and the conversion is a loop of its own, as fast as it can be.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../arguments.h"
#include "../numeric.h"
#include "simd.h"

namespace qgm::cpu {

template <class Storage>
constexpr DType kDTypeOf = std::is_same_v<Storage, float>      ? DType::kFloat32
                           : std::is_same_v<Storage, double>   ? DType::kFloat64
                           : std::is_same_v<Storage, bfloat16> ? DType::kBFloat16
                                                               : DType::kFloat16;

template <class Storage>
struct WidenBody {
  static QGM_HD void run(const Storage* from, int64_t count, float* to) {
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) to[c] = widen(from[c]);
  }
};

template <class Storage>
struct NarrowBody {
  static QGM_HD void run(const float* from, int64_t count, Storage* to) {
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) to[c] = narrow<Storage>(from[c]);
  }
};

// The storage type of one call and the SIMD level of its conversions. T is the compute type.
template <class T>
struct StoredRows {
  DType dtype;
  Simd simd;

  QGM_HD bool staged() const {
    return std::is_same_v<T, float> && (dtype == DType::kBFloat16 || dtype == DType::kFloat16);
  }
  QGM_HD int64_t bytes() const { return staged() ? int64_t(sizeof(uint16_t)) : int64_t(sizeof(T)); }

  template <class Byte>  // char or const char
  QGM_HD Byte* at(Byte* row, int64_t c) const {
    return row + c * bytes();
  }

  void load(const void* from, int64_t count, T* to) const {
    if constexpr (std::is_same_v<T, float>) {
      if (dtype == DType::kBFloat16) {
        SimdLevels<WidenBody<bfloat16>, const bfloat16*, int64_t, float*>::run(simd, static_cast<const bfloat16*>(from),
                                                                               count, to);
      } else {
        SimdLevels<WidenBody<float16>, const float16*, int64_t, float*>::run(simd, static_cast<const float16*>(from),
                                                                             count, to);
      }
    }
  }

  void store(const T* from, int64_t count, void* to) const {
    if constexpr (std::is_same_v<T, float>) {
      if (dtype == DType::kBFloat16) {
        SimdLevels<NarrowBody<bfloat16>, const float*, int64_t, bfloat16*>::run(simd, from, count,
                                                                                static_cast<bfloat16*>(to));
      } else {
        SimdLevels<NarrowBody<float16>, const float*, int64_t, float16*>::run(simd, from, count,
                                                                              static_cast<float16*>(to));
      }
    }
  }
};

}  // namespace qgm::cpu
