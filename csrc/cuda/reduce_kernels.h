// The kernels behind reduce.h.
#pragma once

#include <cstdint>

#include "../numeric.h"
#include "launch.h"

namespace qgm::cuda {

struct ReduceParameters {
  int64_t rows, cols, stride, blocks;  // blocks of coordinates in a row
  double* sums;
};

// The tree over the lanes of a block: 128, 64, ..., 1. The sum is thread 0's.
template <class T>
__device__ __forceinline__ T sum_lanes(T value, T* shared) {
  const int lane = int(threadIdx.x);
  shared[lane] = value;
  if (!kFaultNoBarrier) __syncthreads();
  for (int half = int(kReduceLanes) / 2; half >= 32; half /= 2) {
    if (lane < half) shared[lane] = shared[lane] + shared[lane + half];
    if (!kFaultNoBarrier) __syncthreads();
  }
  T sum = shared[lane < 32 ? lane : 0];
  if (lane < 32) {
    for (int half = 16; half > 0; half /= 2) sum = sum + __shfl_down_sync(0xffffffffu, sum, half);
  }
  __syncthreads();  // before the next block of coordinates writes the lanes
  return sum;
}

constexpr int kReduceTerms = int(kReduceBlock / kReduceLanes);

// kFinite counts the values that are infinite or NaN, otherwise squares are summed.
template <class Storage, bool kFinite>
__global__ void __launch_bounds__(kReduceLanes) row_block_sums(const Storage* x, const ReduceParameters p) {
  using T = Compute<Storage>;
  __shared__ T lanes[kReduceLanes];
  for (int64_t task = blockIdx.x; task < p.rows * p.blocks; task += gridDim.x) {
    const int64_t row = task / p.blocks, begin = task % p.blocks * kReduceBlock + threadIdx.x;
    const Storage* const values = x + row * p.stride;
    T sum = T(0);
#pragma unroll
    for (int term = 0; term < kReduceTerms; ++term) {
      const int64_t c = begin + term * kReduceLanes;
      if (c < p.cols + kFaultTail) {
        const T value = widen(values[c]);
        sum = sum + (kFinite ? T(!(value - value == T(0))) : value * value);  // infinity - infinity is NaN
      }
    }
    sum = sum_lanes(sum, lanes);
    if (threadIdx.x == 0) p.sums[task] = double(sum);
  }
}

template <class Storage>
__global__ void __launch_bounds__(kReduceLanes)
    consensus_block_sums(const Storage* x, const ReduceParameters p, Compute<Storage> scale) {
  using T = Compute<Storage>;
  __shared__ T lanes[kReduceLanes];
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    T sum = T(0);
    for (int term = 0; term < kReduceTerms; ++term) {
      const int64_t c = block * kReduceBlock + term * kReduceLanes + threadIdx.x;
      if (c < p.cols + kFaultTail) {
        const Storage* const column = x + c;
        T mean = widen(column[0]);
#pragma unroll 8
        for (int64_t i = 1; i < p.rows; ++i) mean = mean + widen(column[i * p.stride]);
        mean = mean * scale;
        T squares = T(0);
#pragma unroll 8
        for (int64_t i = 0; i < p.rows; ++i) {
          const T difference = widen(column[i * p.stride]) - mean;
          squares = squares + difference * difference;
        }
        sum = sum + squares;
      }
    }
    sum = sum_lanes(sum, lanes);
    if (threadIdx.x == 0) p.sums[block] = double(sum);
  }
}

// The sums of squares that row_block_sums gives for x, where lane_sums [rows, blocks, kReduceLanes] holds the lanes'
// sums over coordinates [0, summed) already; null: over none.
template <class T>
__global__ void __launch_bounds__(kReduceLanes)
    block_sums_of(const T* x, const T* lane_sums, int64_t summed, const ReduceParameters p) {
  __shared__ T lanes[kReduceLanes];
  for (int64_t task = blockIdx.x; task < p.rows * p.blocks; task += gridDim.x) {
    const int64_t row = task / p.blocks, begin = task % p.blocks * kReduceBlock + threadIdx.x;
    const T* const values = x + row * p.stride;
    T sum = lane_sums == nullptr ? T(0) : lane_sums[task * kReduceLanes + threadIdx.x];
#pragma unroll
    for (int term = 0; term < kReduceTerms; ++term) {
      const int64_t c = begin + term * kReduceLanes;
      if (c >= summed && c < p.cols + kFaultTail) sum = sum + values[c] * values[c];
    }
    sum = sum_lanes(sum, lanes);
    if (threadIdx.x == 0) p.sums[task] = double(sum);
  }
}

// What becomes of the sum of all blocks of a row.
enum class Finish : int { kSum, kDistance, kFinite };

// One thread block per row: it fetches a piece of the block sums together, thread 0 adds them in order.
template <Finish kFinish, class Out>
__global__ void __launch_bounds__(kReduceLanes) finish_rows(const ReduceParameters p, double workers, Out* out) {
  __shared__ double piece[kReduceLanes];
  const int64_t row = blockIdx.x;
  double total = 0.0;
  for (int64_t begin = 0; begin < p.blocks; begin += kReduceLanes) {
    const int64_t left = p.blocks - begin, count = left < kReduceLanes ? left : kReduceLanes;
    if (int64_t(threadIdx.x) < count) piece[threadIdx.x] = p.sums[row * p.blocks + begin + threadIdx.x];
    if (!kFaultNoBarrier) __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 8
      for (int64_t b = 0; b < count; ++b) total += piece[b];
    }
    if (!kFaultNoBarrier) __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (kFinish == Finish::kSum) out[row] = Out(total);
    if (kFinish == Finish::kDistance) out[row] = Out(sqrt(total / workers));
    if (kFinish == Finish::kFinite) out[row] = Out(total == 0.0);
  }
}

}  // namespace qgm::cuda
