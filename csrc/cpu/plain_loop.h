// The yardsticks of the benchmarks: loops over whole arrays that do next to nothing. Not used in training.
//
// PlainLoop reads three arrays and writes two, as the fused step of QG-DSGDm does for one worker without
// neighbours. PlainTiles does the same to n rows in the order of the fused step, tile by tile, with its
// prefetching: what the order of access alone costs. PlainStreams<R, W> reads R arrays and writes the first W of them.
#pragma once

#include <cstdint>

#include "../platform.h"

namespace qgm::cpu {

struct PlainLoop {
  static QGM_HD void run(float* x, const float* g, float* m, int64_t size) {
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < size; ++c) {
      m[c] = 0.9f * m[c] + g[c];
      x[c] = x[c] - 0.1f * m[c];
    }
  }
};

struct PlainTiles {
  static QGM_HD void run(float* x, const float* g, float* m, int64_t rows, int64_t cols) {
    constexpr int64_t kWidth = 64, kAhead = 2 * kWidth, kLine = 16;
    for (int64_t begin = 0; begin + kWidth <= cols; begin += kWidth) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * cols + begin;
        for (int64_t c = kAhead; c < kAhead + kWidth && begin + c < cols; c += kLine) {
          __builtin_prefetch(x + at + c, 0, 2);
          __builtin_prefetch(g + at + c, 0, 2);
          __builtin_prefetch(m + at + c, 0, 2);
        }
        PlainLoop::run(x + at, g + at, m + at, kWidth);
      }
    }
  }
};

constexpr int kMaxStreams = 8;

template <int kReads, int kWrites>
struct PlainStreams {
  static QGM_HD void run(float* const* arrays, int64_t size) {
    float* a[kReads];
    for (int k = 0; k < kReads; ++k) a[k] = arrays[k];
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < size; ++c) {
      float sum = 0.0f;
      for (int k = 0; k < kReads; ++k) sum = sum * 0.5f + a[k][c];
      for (int k = 0; k < kWrites; ++k) a[k][c] = sum;
    }
  }
};

}  // namespace qgm::cpu
