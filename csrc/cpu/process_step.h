// One worker's step in two halves, around communication: local_step makes the messages that are sent,
// merge mixes what arrived. Together they give the bits of the fused pass (gossip_step.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "gossip_step.h"

namespace qgm::cpu {

struct LocalStepArguments : qgm::LocalStepArguments {
  int threads;
  Simd simd;
};

struct MergeArguments : qgm::MergeArguments {
  int threads;
  Simd simd;
};

template <template <class> class RuleOf, class Storage>
struct LocalStepBody {
  using Loops = RuleLoops<RuleOf, Storage>;
  using T = typename Loops::T;

  static QGM_HD void run(const LocalStepArguments& a, int64_t begin, int64_t end) {
    typename Loops::Row row;
    row.x = static_cast<Storage*>(const_cast<void*>(a.x)) + begin;  // read only: local() stores no x
    row.g = static_cast<const Storage*>(a.g) + begin;
    for (int k = 0; k < Loops::kStates; ++k) row.state[k] = static_cast<T*>(a.state[k]) + begin;
    Values<T*, Loops::kMessages> out;
    for (int k = 0; k < Loops::kMessages; ++k) out[k] = static_cast<T*>(a.message[k]) + begin;
    Loops::local(typename Loops::Rule(a.hyper), row, end - begin, out);
  }
};

template <template <class> class RuleOf, class Storage>
struct MergeBody {
  using Loops = RuleLoops<RuleOf, Storage>;
  using T = typename Loops::T;

  template <class Length>
  static QGM_HD void tile(const MergeArguments& a, const typename Loops::Rule& rule, const T* weights,
                          int64_t begin, Length length, T* mixed) {
    typename Loops::Row row;
    row.x = static_cast<Storage*>(a.x) + begin;
    row.g = static_cast<const Storage*>(a.g) + begin;
    for (int k = 0; k < Loops::kStates; ++k) row.state[k] = static_cast<T*>(a.state[k]) + begin;
    for (int k = 0; k < Loops::kMessages; ++k) {
      const auto message = [&](int64_t q) {
        return static_cast<const T*>(a.received[k * a.terms + q]) + begin;
      };
      if (a.mean) {
        mean(message, a.terms, length, mixed + k * kTileWidth);
      } else {
        weighted_sum(message, weights, a.terms, length, mixed + k * kTileWidth);
      }
    }
    Loops::merge(rule, row, length, [=](int k, int64_t c) { return mixed[k * kTileWidth + c]; });
  }

  // scratch: kMessages tiles, then the weights in the compute type.
  static QGM_HD const T* load_weights(const MergeArguments& a, T* scratch) {
    T* const weights = scratch + Loops::kMessages * kTileWidth;
    for (int64_t q = 0; q < a.terms; ++q) weights[q] = T(a.weights[q]);
    return weights;
  }

  // Whole tiles [first, last).
  static QGM_HD void run(const MergeArguments& a, int64_t first, int64_t last, T* scratch) {
    const typename Loops::Rule rule(a.hyper);
    const T* const weights = load_weights(a, scratch);
    for (int64_t t = first; t < last; ++t) tile(a, rule, weights, t * kTileWidth, kTile, scratch);
  }

  // The short tile at the end: once a call, so one version for all SIMD levels is enough.
  __attribute__((noinline)) static void run_rest(const MergeArguments& a, int64_t begin, T* scratch) {
    tile(a, typename Loops::Rule(a.hyper), load_weights(a, scratch), begin, a.size - begin, scratch);
  }
};

template <template <class> class RuleOf, class Storage>
void local_step(const LocalStepArguments& a) {
  const int threads = threads_for(a.size, a.size, a.threads);
  parallel_for(a.size, threads, [&](int, int64_t begin, int64_t end) {
    SimdLevels<LocalStepBody<RuleOf, Storage>, const LocalStepArguments&, int64_t, int64_t>::run(a.simd, a, begin,
                                                                                              end);
  });
}

template <template <class> class RuleOf, class Storage>
void merge(const MergeArguments& a) {
  using Body = MergeBody<RuleOf, Storage>;
  using T = typename Body::T;
  const int64_t whole = a.size / kTileWidth, tiles = (a.size + kTileWidth - 1) / kTileWidth;
  const int threads = threads_for(a.size, tiles, a.threads);
  const int64_t per_thread = Body::Loops::kMessages * kTileWidth + a.terms;
  const ScratchBuffer<T> scratch(threads * per_thread);
  parallel_for(tiles, threads, [&](int thread, int64_t first, int64_t last) {
    T* const mine = scratch.data() + thread * per_thread;
    SimdLevels<Body, const MergeArguments&, int64_t, int64_t, T*>::run(a.simd, a, first, std::min(last, whole), mine);
    if (last > whole) Body::run_rest(a, whole * kTileWidth, mine);
  });
}

}  // namespace qgm::cpu
