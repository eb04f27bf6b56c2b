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
  DType storage;  // of x and g; set by local_step
};

struct MergeArguments : qgm::MergeArguments {
  int threads;
  Simd simd;
  DType storage;  // of x and g; set by merge
};

// Coordinates that are staged, or mixed, at a time.
constexpr std::integral_constant<int64_t, 128> kProcessTile{};
constexpr int64_t kProcessTileWidth = kProcessTile;

template <template <class> class RuleOf, class Compute>
struct LocalStepBody {
  using Loops = RuleLoops<RuleOf, Compute>;
  using T = Compute;

  static QGM_HD void run(const LocalStepArguments& a, int64_t begin, int64_t end) {
    const auto rule = for_row(typename Loops::Rule(a.hyper), static_cast<const T*>(a.row_scalars), 0);
    const StoredRows<T> rows{a.storage, a.simd};
    alignas(64) T x[kProcessTileWidth],
        g[kProcessTileWidth];  // for 16-bit storage; otherwise the whole range is one piece
    const int64_t piece = rows.staged() ? kProcessTileWidth : end - begin;
    for (int64_t first = begin; first < end; first += piece) {
      const int64_t length = std::min(piece, end - first);
      const char* const x_stored = rows.at(static_cast<const char*>(a.x), first);
      const char* const g_stored = rows.at(static_cast<const char*>(a.g), first);
      typename Loops::Row row;
      if (rows.staged()) {
        rows.load(x_stored, length, x);
        rows.load(g_stored, length, g);
        row.x = x;
        row.g = g;
      } else {
        row.x = reinterpret_cast<T*>(const_cast<char*>(x_stored));  // read only: local() stores no x
        row.g = reinterpret_cast<const T*>(g_stored);
      }
      for (int k = 0; k < Loops::kStates; ++k) row.state[k] = static_cast<T*>(a.state[k]) + first;
      Values<T*, Loops::kMessages> out;
      for (int k = 0; k < Loops::kMessages; ++k) out[k] = static_cast<T*>(a.message[k]) + first;
      Loops::local(rule, row, length, out);
    }
  }
};

template <template <class> class RuleOf, class Compute>
struct MergeBody {
  using Loops = RuleLoops<RuleOf, Compute>;
  using T = Compute;

  using Rule = typename Loops::Rule;
  static_assert(kReduceLanes % kProcessTileWidth == 0, "a tile lies in one row of lanes");

  // scratch: kMessages tiles, a tile of x and one of g for 16-bit storage, the lanes of the rule's norm, the weights in
  // the compute type.
  static constexpr int64_t kLanesAt = (Loops::kMessages + 2) * kProcessTileWidth;
  static constexpr int64_t kWeightsAt = kLanesAt + (kHasNorm<Rule> ? kReduceLanes : 0);

  template <class Length>
  static QGM_HD void tile(const MergeArguments& a, const Rule& rule, const T* weights, int64_t begin, Length length,
                          T* mixed) {
    const StoredRows<T> rows{a.storage, a.simd};
    char* const x_stored = rows.at(static_cast<char*>(a.x), begin);
    const char* const g_stored = rows.at(static_cast<const char*>(a.g), begin);
    typename Loops::Row row;
    if (rows.staged()) {
      T *const x = mixed + Loops::kMessages * kProcessTileWidth, *const g = x + kProcessTileWidth;
      if (Rule::kMergeReadsX) rows.load(x_stored, length, x);
      if (Rule::kMergeReadsGrad) rows.load(g_stored, length, g);
      row.x = x;
      row.g = g;
    } else {
      row.x = reinterpret_cast<T*>(x_stored);
      row.g = reinterpret_cast<const T*>(g_stored);
    }
    for (int k = 0; k < Loops::kStates; ++k) row.state[k] = static_cast<T*>(a.state[k]) + begin;
    for (int k = 0; k < Loops::kMessages; ++k) {
      const auto message = [&](int64_t q) { return static_cast<const T*>(a.received[k * a.terms + q]) + begin; };
      if (a.mean) {
        mean(message, a.terms, length, mixed + k * kProcessTileWidth);
      } else {
        weighted_sum(message, weights, a.terms, length, mixed + k * kProcessTileWidth);
      }
    }
    Loops::merge(rule, row, length, [=](int k, int64_t c) { return mixed[k * kProcessTileWidth + c]; });
    if (rows.staged()) rows.store(row.x, length, x_stored);
    if constexpr (kHasNorm<Rule>) {
      const BlockSums<T> sums{mixed + kLanesAt, a.block_sums, 1, a.size};
      sums.add(0, begin, row.state[kNormState<Rule>], length);
      sums.close(begin + length);
    }
  }

  static QGM_HD const T* load_weights(const MergeArguments& a, T* scratch) {
    T* const weights = scratch + kWeightsAt;
    for (int64_t q = 0; q < a.terms; ++q) weights[q] = T(a.weights[q]);
    return weights;
  }

  static QGM_HD auto rule_of(const MergeArguments& a) {
    return for_row(Rule(a.hyper), static_cast<const T*>(a.row_scalars), 0);
  }

  // Coordinates [first, last), whole tiles.
  static QGM_HD void run(const MergeArguments& a, int64_t first, int64_t last, T* scratch) {
    const auto rule = rule_of(a);
    const T* const weights = load_weights(a, scratch);
    for (int64_t begin = first; begin < last; begin += kProcessTileWidth) {
      tile(a, rule, weights, begin, kProcessTile, scratch);
    }
  }

  // The short tile at the end.
  __attribute__((noinline)) static void run_rest(const MergeArguments& a, int64_t begin, T* scratch) {
    tile(a, rule_of(a), load_weights(a, scratch), begin, a.size - begin, scratch);
  }
};

template <template <class> class RuleOf, class Storage>
void local_step(const LocalStepArguments& a) {
  using Body = LocalStepBody<RuleOf, Compute<Storage>>;
  LocalStepArguments typed = a;
  typed.storage = kDTypeOf<Storage>;
  parallel_for(a.size, threads_for(a.size, a.size, a.threads), [&](int, int64_t begin, int64_t end) {
    SimdLevels<Body, const LocalStepArguments&, int64_t, int64_t>::run(a.simd, typed, begin, end);
  });
}

template <template <class> class RuleOf, class Storage>
void merge(const MergeArguments& a) {
  MergeArguments typed = a;
  typed.storage = kDTypeOf<Storage>;
  using Body = MergeBody<RuleOf, Compute<Storage>>;
  constexpr int64_t kShare = kSmallestShare<typename Body::Rule, kProcessTileWidth>;
  run_in_shares<Body, Compute<Storage>>(typed, 1, a.size, kShare, kProcessTileWidth, Body::kWeightsAt + a.terms);
}

}  // namespace qgm::cpu
