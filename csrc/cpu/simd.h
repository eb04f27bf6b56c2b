// One body compiled for several SIMD levels, chosen when it is called.
//
// As GCC's target_clones, but the level is an argument: tests run every level of the machine and
// compare the bits. No level enables fused multiply-add. -DQGM_ONE_SIMD_LEVEL leaves the baseline only:
// sanitizers make the code several times larger.
#pragma once

#include "../platform.h"

namespace qgm::cpu {

enum class Simd : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

#if defined(__x86_64__) && !defined(QGM_ONE_SIMD_LEVEL)
#define QGM_TARGET_AVX2 __attribute__((target("avx2"), flatten, noinline))
#define QGM_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"), flatten, noinline))

inline Simd best_simd() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Simd::kAvx512;
  }
  return __builtin_cpu_supports("avx2") ? Simd::kAvx2 : Simd::kBaseline;
}

// Body has a static, always-inline run(Arguments...).
template <class Body, class... Arguments>
struct SimdLevels {
  __attribute__((flatten, noinline)) static void baseline(Arguments... a) { Body::run(a...); }
  QGM_TARGET_AVX2 static void avx2(Arguments... a) { Body::run(a...); }
  QGM_TARGET_AVX512 static void avx512(Arguments... a) { Body::run(a...); }

  static void run(Simd level, Arguments... a) {
    switch (level) {
      case Simd::kAvx512:
        return avx512(a...);
      case Simd::kAvx2:
        return avx2(a...);
      case Simd::kBaseline:
        return baseline(a...);
    }
  }
};
#else
inline Simd best_simd() { return Simd::kBaseline; }

template <class Body, class... Arguments>
struct SimdLevels {
  static void run(Simd, Arguments... a) { Body::run(a...); }
};
#endif

}  // namespace qgm::cpu
