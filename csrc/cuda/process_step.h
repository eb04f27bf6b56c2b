// One worker's step in two halves, around communication, over one flat buffer or a bucket of it:
// local_step makes the messages that are sent, merge mixes what arrived. Together they give the bits of
// the fused pass (gossip_step.h). Where a rule has a norm, a block of threads merges a whole block of the reduction at
// a time: its new state passes through shared memory, where the squares are summed in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "gossip_step.h"
#include "launch.h"
#include "slice.h"

namespace qgm::cuda {

constexpr int kFlatThreads = 256;
// On a multiprocessor, at least: up to 64 registers a thread, 128 where a value takes two of them or a rule moves many
// vectors.
template <class Rule, class T>
constexpr int kFlatBlocks = sizeof(T) == 8 || Rule::kMessages > 1 || Rule::kStates + Rule::kMessages > 3 ? 2 : 4;

// The aligned coordinates are [head, head + vectors V); the rest, in front and behind, go one by one.
struct Extent {
  int64_t head, vectors, size;
};

template <class Rule, class Storage>
struct LocalStepParameters {
  using T = Compute<Storage>;
  const Storage* x;
  const Storage* g;
  Values<T*, Rule::kStates> state;
  Values<T*, Rule::kMessages> message;
  Extent extent;
  const T* row_scalars;  // [kRowScalars]
  Rule rule;
};

// A received vector is as long as the model, so nobody has room for many; the pointers travel as kernel
// arguments, of which there may be 4 KiB.
constexpr int kMaxReceived = 160;

template <class Rule, class Storage>
struct MergeParameters {
  using T = Compute<Storage>;
  Storage* x;
  const Storage* g;
  Values<T*, Rule::kStates> state;
  Extent extent;
  const T* row_scalars;  // [kRowScalars]
  Rule rule;
  bool mean;
  T scale;             // 1 / terms
  double* block_sums;  // [reduce_blocks(size)], of a rule with a norm
  int32_t terms;
  const T* received[kMaxReceived];
  T weights[kMaxReceived];
};

// Calls step(c, integral constant V) for all coordinates of this thread.
template <int V, class Step>
QGM_HD void for_coordinates(const Extent& e, int64_t thread, int64_t threads, const Step& step) {
#pragma unroll 1
  for (int64_t v = thread; v < e.vectors; v += threads) step(e.head + v * V, std::integral_constant<int, V>{});
  const int64_t edge = e.size - e.vectors * V + kFaultTail;
#pragma unroll 1
  for (int64_t k = thread; k < edge; k += threads) {
    step(k < e.head ? k : k + e.vectors * V, std::integral_constant<int, 1>{});
  }
}

template <class Rule, class Storage>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks<Rule, Compute<Storage>>)
    local_flat(const LocalStepParameters<Rule, Storage> p) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const Rule rule = for_row(p.rule, p.row_scalars, 0);
  for_coordinates<kVector<Compute<Storage>>>(p.extent, thread, threads, [&](int64_t c, auto width) {
    constexpr int V = decltype(width)::value;
    using S = Slice<Rule, Storage, V>;
    S slice;
    slice.x = load_vector<V>(p.x + c);
    slice.g = load_vector<V>(p.g + c);
    slice.template load_states<Rule::kLocalReads>(p.state, c);
    typename S::Messages message;
    slice.local(rule, message);
    slice.template store_states<Rule::kLocalWrites>(p.state, c);
    for (int k = 0; k < Rule::kMessages; ++k) store_global(p.message[k] + c, message[k]);
  });
}

// Mixes what arrived at the V coordinates from c on and merges it.
template <int V, class Rule, class Storage>
__device__ __forceinline__ Slice<Rule, Storage, V> merge_at(const MergeParameters<Rule, Storage>& p, const Rule& rule,
                                                            int64_t c) {
  Slice<Rule, Storage, V> slice;
  if (Rule::kMergeReadsX) slice.x = load_vector<V>(p.x + c);
  if (Rule::kMergeReadsGrad) slice.g = load_vector<V>(p.g + c);
  slice.template load_states<Rule::kMergeReads>(p.state, c);
  typename Slice<Rule, Storage, V>::Messages mixed;
  for (int k = 0; k < Rule::kMessages; ++k) {
    const int first = k * p.terms;
    const auto term = load_vector<V>(p.received[first] + c);
    if (p.mean) {
      mixed[k] = term;
#pragma unroll 4
      for (int q = 1; q < p.terms; ++q) {
        const auto next = load_vector<V>(p.received[first + q] + c);
        for (int v = 0; v < V; ++v) mixed[k].at[v] = mixed[k].at[v] + next.at[v];
      }
      mixed[k] = product(p.scale, mixed[k]);
    } else {
      mixed[k] = product(p.weights[0], term);
#pragma unroll 4
      for (int q = 1; q < p.terms; ++q) {
        add_product(mixed, k, p.weights[q], load_vector<V>(p.received[first + q] + c));
      }
    }
  }
  slice.merge(rule, mixed);
  store_global(p.x + c, slice.x);
  slice.template store_states<Rule::kMergeWrites>(p.state, c);
  return slice;
}

template <class Rule, class Storage>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks<Rule, Compute<Storage>>)
    merge_flat(const __grid_constant__ MergeParameters<Rule, Storage> p) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const Rule rule = for_row(p.rule, p.row_scalars, 0);
  for_coordinates<kVector<Compute<Storage>>>(
      p.extent, thread, threads, [&](int64_t c, auto width) { merge_at<decltype(width)::value>(p, rule, c); });
}

// The same for a rule with a norm: a block of the reduction at a time, and its sum of squares. Rows that don't begin at
// a vector go one coordinate at a time, since a vector would belong to two blocks.
template <class Rule, class Storage>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks<Rule, Compute<Storage>>)
    merge_blocks(const __grid_constant__ MergeParameters<Rule, Storage> p) {
  using T = Compute<Storage>;
  static_assert(kFlatThreads == kReduceLanes, "a thread sums a lane");
  constexpr int V = kVector<T>;
  alignas(16) __shared__ T values[kReduceBlock];
  __shared__ T lanes[kReduceLanes];
  const Rule rule = for_row(p.rule, p.row_scalars, 0);
  const int64_t vectors_end = p.extent.head == 0 ? p.extent.vectors * V : 0;
#pragma unroll 1
  for (int64_t block = blockIdx.x; block * kReduceBlock < p.extent.size; block += gridDim.x) {
    const int64_t begin = block * kReduceBlock, left = p.extent.size - begin;
    const int count = int(left < kReduceBlock ? left : kReduceBlock);
    const int64_t whole = vectors_end - begin;
    const int wide = whole <= 0 ? 0 : int(whole < count ? whole : count);
#pragma unroll 1
    for (int at = int(threadIdx.x) * V; at < wide; at += kFlatThreads * V) {
      store_shared(values + at, merge_at<V>(p, rule, begin + at).state[kNormState<Rule>]);
    }
#pragma unroll 1
    for (int at = wide + int(threadIdx.x); at < count + kFaultTail; at += kFlatThreads) {
      values[at] = merge_at<1>(p, rule, begin + at).state[kNormState<Rule>].at[0];
    }
    if (!kFaultNoBarrier) __syncthreads();
    T sum = T(0);
#pragma unroll
    for (int term = 0; term < kReduceTerms; ++term) {
      const int at = term * int(kReduceLanes) + int(threadIdx.x);
      if (at < count) sum = sum + values[at] * values[at];
    }
    sum = sum_lanes(sum, lanes);
    if (threadIdx.x == 0) p.block_sums[block] = double(sum);
  }
}

// Finds how much of vectors that start at several addresses can go V at a time.
class Alignment {
 public:
  template <class T>
  Alignment(const T* p, int count) : count_(count), head_(to_alignment(p, count)) {}

  template <class T>
  void also(const T* p) {
    equal_ = equal_ && to_alignment(p, count_) == head_;
  }

  Extent extent(int64_t size) const {
    if (!equal_ || head_ >= size) return {0, 0, size};
    return {head_, (size - head_) / count_, size};
  }

 private:
  int count_;
  int64_t head_;
  bool equal_ = true;
};

inline int64_t flat_blocks(const Extent& e) {
  const int64_t items = std::max<int64_t>(e.vectors, 1 + (e.vectors == 0 ? e.size : 0));
  return (items + kFlatThreads - 1) / kFlatThreads;
}

template <template <class> class RuleOf, class Storage>
void local_step(const LocalStepArguments& a) {
  using T = Compute<Storage>;
  using Rule = RuleOf<T>;
  const Device device("local_step_", a.device);
  LocalStepParameters<Rule, Storage> p{static_cast<const Storage*>(a.x),
                                       static_cast<const Storage*>(a.g),
                                       {},
                                       {},
                                       {},
                                       static_cast<const T*>(a.row_scalars),
                                       Rule(a.hyper)};
  Alignment alignment(p.x, kVector<T>);
  alignment.also(p.g);
  for (int k = 0; k < Rule::kStates; ++k) alignment.also(p.state[k] = static_cast<T*>(a.state[k]));
  for (int k = 0; k < Rule::kMessages; ++k) alignment.also(p.message[k] = static_cast<T*>(a.message[k]));
  p.extent = alignment.extent(a.size);
  launch("local_step_", device, local_flat<Rule, Storage>, flat_blocks(p.extent), dim3(kFlatThreads), 0, a.stream, p);
}

template <template <class> class RuleOf, class Storage>
void merge(const MergeArguments& a) {
  using T = Compute<Storage>;
  using Rule = RuleOf<T>;
  if (Rule::kMessages * a.terms > kMaxReceived) {
    throw std::runtime_error("merge_: a CUDA device takes at most " + std::to_string(kMaxReceived) +
                             " received vectors (messages times workers), got " +
                             std::to_string(Rule::kMessages * a.terms));
  }
  const Device device("merge_", a.device);
  MergeParameters<Rule, Storage> p{static_cast<Storage*>(a.x),
                                   static_cast<const Storage*>(a.g),
                                   {},
                                   {},
                                   static_cast<const T*>(a.row_scalars),
                                   Rule(a.hyper),
                                   a.mean,
                                   T(1) / T(a.terms),
                                   a.block_sums,
                                   int32_t(a.terms),
                                   {},
                                   {}};
  Alignment alignment(p.x, kVector<T>);
  if (Rule::kMergeReadsGrad) alignment.also(p.g);
  for (int k = 0; k < Rule::kStates; ++k) alignment.also(p.state[k] = static_cast<T*>(a.state[k]));
  for (int64_t q = 0; q < Rule::kMessages * a.terms; ++q) {
    alignment.also(p.received[q] = static_cast<const T*>(a.received[q]));
  }
  for (int64_t q = 0; q < a.terms; ++q) p.weights[q] = T(a.weights[q]);
  p.extent = alignment.extent(a.size);
  if constexpr (kHasNorm<Rule>) {
    launch("merge_", device, merge_blocks<Rule, Storage>, reduce_blocks(a.size), dim3(kFlatThreads), 0, a.stream, p);
  } else {
    launch("merge_", device, merge_flat<Rule, Storage>, flat_blocks(p.extent), dim3(kFlatThreads), 0, a.stream, p);
  }
}

}  // namespace qgm::cuda
