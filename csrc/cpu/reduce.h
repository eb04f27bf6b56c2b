// Reductions that give the same bits on every thread count, SIMD level and device, and the norm that a fused pass
// takes along (rule.h: kNormState), with those bits too.
// The order of summation is said in ../arguments.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../arguments.h"
#include "../numeric.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace qgm::cpu {

struct ReduceArguments : qgm::ReduceArguments {
  int threads;
  Simd simd;
};

template <class T>
QGM_HD double sum_lanes(T* lanes) {
  for (int64_t half = kReduceLanes / 2; half > 0; half /= 2) {
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  }
  return double(lanes[0]);
}

// block_sums[i, b] = sum of squares of row i over block b.
template <class Storage>
struct SquaredNormBody {
  using T = Compute<Storage>;

  static QGM_HD void run(const ReduceArguments& a, int64_t first, int64_t last, double* block_sums) {
    const int64_t blocks = reduce_blocks(a.cols);
    for (int64_t task = first; task < last; ++task) {
      const int64_t i = task / blocks, begin = task % blocks * kReduceBlock;
      const int64_t end = std::min(a.cols, begin + kReduceBlock);
      const Storage* x = static_cast<const Storage*>(a.x) + i * a.stride;
      T lanes[kReduceLanes] = {};
      for (int64_t c = begin; c < end; c += kReduceLanes) {
        const int64_t width = std::min(kReduceLanes, end - c);
        for (int64_t l = 0; l < width; ++l) {
          const T value = widen(x[c + l]);
          lanes[l] = lanes[l] + value * value;
        }
      }
      block_sums[task] = sum_lanes(lanes);
    }
  }
};

// The squares of one state vector, gathered tile by tile while a pass makes it. A thread's tiles must be whole blocks.
template <class T>
struct BlockSums {
  T* lanes;     // [rows, kReduceLanes], zero when a block begins
  double* out;  // [rows, reduce_blocks(cols)]
  int64_t rows, cols;

  // Values of row i from coordinate `begin` on, at most to the next multiple of kReduceLanes.
  template <class Length>
  QGM_HD void add(int64_t i, int64_t begin, const T* values, Length length) const {
    const int64_t count = length;
    T* const own = lanes + i * kReduceLanes + begin % kReduceLanes;
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t l = 0; l < count; ++l) own[l] = own[l] + values[l] * values[l];
  }

  // All rows have been added up to coordinate `end`: closes the block if it ends there.
  QGM_HD void close(int64_t end) const {
    if (end % kReduceBlock != 0 && end != cols) return;
    for (int64_t i = 0; i < rows; ++i) {
      T* const own = lanes + i * kReduceLanes;
      out[i * reduce_blocks(cols) + (end - 1) / kReduceBlock] = sum_lanes(own);
      for (int64_t l = 0; l < kReduceLanes; ++l) own[l] = T(0);
    }
  }
};

// block_sums[b] = sum over workers i and the coordinates of block b of (x_i - mean_j x_j)^2; for each
// coordinate, workers in ascending order.
template <class Storage>
struct ConsensusBody {
  using T = Compute<Storage>;

  static QGM_HD void run(const ReduceArguments& a, int64_t first, int64_t last, double* block_sums) {
    const T scale = T(1) / T(a.rows);
    const Storage* x = static_cast<const Storage*>(a.x);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kReduceBlock, end = std::min(a.cols, begin + kReduceBlock);
      T lanes[kReduceLanes] = {};
      for (int64_t c = begin; c < end; c += kReduceLanes) {
        const int64_t width = std::min(kReduceLanes, end - c);
        T mean[kReduceLanes], squares[kReduceLanes];
        for (int64_t l = 0; l < width; ++l) mean[l] = widen(x[c + l]);
        for (int64_t i = 1; i < a.rows; ++i) {
          const Storage* row = x + i * a.stride + c;
          for (int64_t l = 0; l < width; ++l) mean[l] = mean[l] + widen(row[l]);
        }
        for (int64_t l = 0; l < width; ++l) {
          mean[l] = mean[l] * scale;
          squares[l] = T(0);
        }
        for (int64_t i = 0; i < a.rows; ++i) {
          const Storage* row = x + i * a.stride + c;
          for (int64_t l = 0; l < width; ++l) {
            const T difference = widen(row[l]) - mean[l];
            squares[l] = squares[l] + difference * difference;
          }
        }
        for (int64_t l = 0; l < width; ++l) lanes[l] = lanes[l] + squares[l];
      }
      block_sums[b] = sum_lanes(lanes);
    }
  }
};

// finite[i] = whether no value of row i is infinite or NaN.
template <class Storage>
struct FiniteBody {
  static QGM_HD void run(const ReduceArguments& a, int64_t first, int64_t last, uint8_t* finite) {
    for (int64_t i = first; i < last; ++i) {
      const Storage* x = static_cast<const Storage*>(a.x) + i * a.stride;
      int64_t bad = 0;  // counts instead of leaving early: the loop stays a vector loop
      for (int64_t c = 0; c < a.cols; ++c) {
        const auto value = widen(x[c]);
        bad += !(value - value == 0);  // infinity - infinity and NaN - NaN are NaN
      }
      finite[i] = bad == 0;
    }
  }
};

// out[i] = sum_b sums[i, b]
inline void sum_blocks(const double* sums, int64_t rows, int64_t blocks, double* out) {
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0.0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[i * blocks + b];
    out[i] = total;
  }
}

// out[i] = sum_c x[i, c]^2
template <class Storage>
void squared_norms(const ReduceArguments& a, double* out) {
  const int64_t blocks = reduce_blocks(a.cols), tasks = a.rows * blocks;
  const ScratchBuffer<double> sums(tasks);
  parallel_for(tasks, threads_for(a.rows * a.cols, tasks, a.threads), [&](int, int64_t first, int64_t last) {
    SimdLevels<SquaredNormBody<Storage>, const ReduceArguments&, int64_t, int64_t, double*>::run(a.simd, a, first, last,
                                                                                                 sums.data());
  });
  sum_blocks(sums.data(), a.rows, blocks, out);
}

// out[0] = sqrt((1 / n) sum_i ||x_i - mean_j x_j||^2)
template <class Storage>
void consensus_distance(const ReduceArguments& a, double* out) {
  const int64_t blocks = reduce_blocks(a.cols);
  const ScratchBuffer<double> sums(blocks);
  parallel_for(blocks, threads_for(a.rows * a.cols, blocks, a.threads), [&](int, int64_t first, int64_t last) {
    SimdLevels<ConsensusBody<Storage>, const ReduceArguments&, int64_t, int64_t, double*>::run(a.simd, a, first, last,
                                                                                               sums.data());
  });
  double total = 0.0;
  for (int64_t b = 0; b < blocks; ++b) total += sums.data()[b];
  out[0] = std::sqrt(total / double(a.rows));
}

template <class Storage>
void rows_are_finite(const ReduceArguments& a, uint8_t* out) {
  parallel_for(a.rows, threads_for(a.rows * a.cols, a.rows, a.threads), [&](int, int64_t first, int64_t last) {
    SimdLevels<FiniteBody<Storage>, const ReduceArguments&, int64_t, int64_t, uint8_t*>::run(a.simd, a, first, last,
                                                                                             out);
  });
}

}  // namespace qgm::cpu
