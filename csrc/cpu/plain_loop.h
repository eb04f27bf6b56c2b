// The yardsticks of the benchmarks: loops over whole arrays that do next to nothing. Not used in training.
//
// PlainLoop reads three arrays and writes two, as the fused step of QG-DSGDm does for one worker without
// neighbours. PlainStreams<R, W> reads R arrays of [rows, cols] and writes the first W of them, `width` columns of each
// row in turn: with one row it is one long loop; with the rows and the tile width of a fused step, and its prefetching,
// it shows what that order of access alone costs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../platform.h"
#include "gossip_step.h"

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

constexpr int kMaxStreams = 8;

template <int kReads, int kWrites>
struct PlainStreams {
  static QGM_HD void run(float* const* arrays, int64_t rows, int64_t cols, int64_t width) {
    for (int64_t begin = 0; begin < cols; begin += width) {
      for (int64_t i = 0; i < rows; ++i) {
        const NextRow next(rows, i, begin, width);
        for (int64_t from = begin; from < std::min(begin + width, cols); from += kChunkWidth) {
          const int64_t length = std::min({kChunkWidth, begin + width - from, cols - from});
          float* a[kReads];
          for (int k = 0; k < kReads; ++k) {
            a[k] = arrays[k] + i * cols + from;
            const int64_t ahead = next.begin + from - begin;
            if (rows > 1) prefetch_run(arrays[k] + next.i * cols + ahead, std::min(length, cols - ahead));
          }
          QGM_INDEPENDENT_ITERATIONS
          for (int64_t c = 0; c < length; ++c) {
            float sum = 0.0f;
            for (int k = 0; k < kReads; ++k) sum = sum * 0.5f + a[k][c];
            for (int k = 0; k < kWrites; ++k) a[k][c] = sum;
          }
        }
      }
    }
  }
};

}  // namespace qgm::cpu
