// The yardstick of the benchmarks: one loop over whole arrays that reads three and writes two, as the
// fused step does for one worker without neighbours (heavy-ball SGD). Not used in training.
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

}  // namespace qgm::cpu
