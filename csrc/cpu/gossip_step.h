// The fused stacked pass: n workers' local step, gossip averaging and merge in one sweep.
//
// The sweep goes tile by tile over the coordinates. A tile is a few cache lines of all n workers:
//   1. local:  x, g and the state of each worker make its message, kept in a scratch tile;
//   2. mix:    sum_j w_ij message_j for one worker, from the scratch tile;
//   3. merge:  the new x and state of that worker, stored in place.
// 2 and 3 follow for a worker as soon as the messages of all its neighbours are there (merge_order).
// What 3 reads again (x, state) was read in 1 and is still in cache, so memory sees every number once.
// Workers of later rows need only messages, never x, so writing in place is safe.
// A rule's norm is summed from what 3 stores, while it is in L1; a thread's tiles are then whole blocks of coordinates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../arguments.h"
#include "parallel.h"
#include "reduce.h"
#include "rule_loops.h"
#include "scratch.h"
#include "simd.h"
#include "storage.h"

namespace qgm::cpu {

// A row and the last worker whose message it needs, itself at least: after that one's local step it can be merged.
struct MergeTurn {
  int32_t last, row;
};

struct GossipStepArguments : qgm::GossipStepArguments {
  int threads;
  Simd simd;
  DType storage;           // of x and g; set by gossip_step
  const MergeTurn* order;  // in which rows are merged; set by gossip_step
};

// Rows in the order in which their messages are complete: on a sparse graph a row is then merged soon after its local
// step, while its x and state are in L1. The mean of all comes last, in one piece.
inline std::vector<MergeTurn> merge_order(const GossipStepArguments& a) {
  std::vector<MergeTurn> order(size_t(a.rows));
  for (int32_t i = 0; i < a.rows; ++i) {
    int32_t last = i;
    if (a.mixing.form == MixingForm::kMean) {
      last = int32_t(a.rows);
    } else if (a.mixing.form != MixingForm::kIdentity && a.mixing.row_offsets[i + 1] > a.mixing.row_offsets[i]) {
      last = std::max(i, a.mixing.columns[a.mixing.row_offsets[i + 1] - 1]);
    }
    order[size_t(i)] = {last, i};
  }
  std::stable_sort(order.begin(), order.end(), [](MergeTurn p, MergeTurn q) { return p.last < q.last; });
  return order;
}

// Coordinates in a tile. Short, so that a row that is merged soon after its local step is still in L1, and the
// messages of 256 workers are in L2; long enough that the set-up of a row's loops is paid back.
constexpr int64_t kGossipTileWidth = 64;
// Tiles in the smallest share of a thread.
template <class Rule, int64_t kTileWidth>
constexpr int64_t kShareTiles = kHasNorm<Rule> ? kReduceBlock / kTileWidth : 1;
// Tiles between asking for a row and its use; more where a tile has few rows and is soon done.
QGM_HD constexpr int64_t prefetch_tiles(int64_t rows) { return std::max<int64_t>(2, 16 / rows); }

template <template <class> class RuleOf, class Compute, int64_t kTileWidth = kGossipTileWidth>
struct GossipTile {
  static constexpr std::integral_constant<int64_t, kTileWidth> kTile{};
  using Loops = RuleLoops<RuleOf, Compute>;
  using T = Compute;
  using Rule = typename Loops::Rule;
  using Row = typename Loops::Row;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kMessages = Rule::kMessages;
  static_assert(kReduceLanes % kTileWidth == 0, "a tile lies in one row of lanes");

  // A thread's scratch: messages [kMessages, rows, kTileWidth], mixed [kMessages, kTileWidth], the lanes of the rule's
  // norm [rows, kReduceLanes] and, for 16-bit storage, x and g of the tile: of all workers if merge reads them again,
  // else of one.
  struct Scratch {
    T *messages, *mixed, *lanes, *x, *g;

    QGM_HD Scratch(const GossipStepArguments& a, T* memory)
        : messages(memory),
          mixed(messages + kMessages * a.rows * kTileWidth),
          lanes(mixed + kMessages * kTileWidth),
          x(lanes + lanes_of(a.rows)),
          g(x + (Rule::kMergeReadsX ? a.rows : 1) * kTileWidth) {}

    static QGM_HD int64_t lanes_of(int64_t rows) { return kHasNorm<Rule> ? rows * kReduceLanes : 0; }

    static int64_t size(const GossipStepArguments& a, bool staged) {
      const int64_t tiles = kMessages * (a.rows + 1);
      return (staged ? tiles + (Rule::kMergeReadsX ? a.rows : 1) + (Rule::kMergeReadsGrad ? a.rows : 1) : tiles) *
                 kTileWidth +
             lanes_of(a.rows);
    }
  };

  static QGM_HD StoredRows<T> stored(const GossipStepArguments& a) { return {a.storage, a.simd}; }

  static QGM_HD char* x_at(const GossipStepArguments& a, int64_t i, int64_t begin) {
    return stored(a).at(static_cast<char*>(a.x), i * a.x_stride + begin);
  }

  static QGM_HD const char* g_at(const GossipStepArguments& a, int64_t i, int64_t begin) {
    return stored(a).at(static_cast<const char*>(a.g), i * a.g_stride + begin);
  }

  static QGM_HD Row row(const GossipStepArguments& a, int64_t i, int64_t begin, const Scratch& scratch) {
    Row r;
    if (stored(a).staged()) {
      r.x = scratch.x + (Rule::kMergeReadsX ? i : 0) * kTileWidth;
      r.g = scratch.g + (Rule::kMergeReadsGrad ? i : 0) * kTileWidth;
    } else {
      r.x = reinterpret_cast<T*>(x_at(a, i, begin));
      r.g = reinterpret_cast<const T*>(g_at(a, i, begin));
    }
    for (int k = 0; k < kStates; ++k) {
      r.state[k] = static_cast<T*>(a.state[k]) + i * a.state_stride + begin;
    }
    return r;
  }

  // Asks for a tile ahead of its use. The rows of a tile are too short for the hardware prefetcher to
  // learn (a single row is one long stream, and needs no help); into L2, because the tiles in between would push it out
  // of L1.
  static QGM_HD void prefetch(const GossipStepArguments& a, int64_t begin, int64_t i) {
    const int64_t length = std::min(kTileWidth, a.cols - begin);
    constexpr int64_t kLine = 64;
    const char *x = x_at(a, i, begin), *g = g_at(a, i, begin);
    for (int64_t byte = 0; byte < length * stored(a).bytes(); byte += kLine) {
      __builtin_prefetch(x + byte, 0, 2);
      __builtin_prefetch(g + byte, 0, 2);
    }
    for (int k = 0; k < kStates; ++k) {
      const T* state = static_cast<const T*>(a.state[k]) + i * a.state_stride + begin;
      for (int64_t c = 0; c < length; c += kLine / int64_t(sizeof(T))) {
        __builtin_prefetch(state + c, 0, 2);
      }
    }
  }

  // Mixes the messages of the tile for worker i and merges them into its row.
  template <class Length>
  static QGM_HD void mix_and_merge(const GossipStepArguments& a, const Rule& rule, int64_t i, const Row& r,
                                   Length length, const T* messages, T* mixed) {
    const int64_t plane = a.rows * kTileWidth;  // from message k to message k + 1
    const T* source = mixed;
    int64_t step = kTileWidth;
    if (a.mixing.form == MixingForm::kIdentity) {
      source = messages + i * kTileWidth;
      step = plane;
    } else if (a.mixing.form != MixingForm::kMean) {
      const int64_t start = a.mixing.row_offsets[i];
      const int64_t count = a.mixing.row_offsets[i + 1] - start;
      const int32_t* columns = a.mixing.columns + start;
      const T* w = static_cast<const T*>(a.mixing.weights) + start;
      if (count == 3) {  // a ring: the sum stays in registers
        const T *m0 = messages + columns[0] * kTileWidth, *m1 = messages + columns[1] * kTileWidth,
                *m2 = messages + columns[2] * kTileWidth;
        const T w0 = w[0], w1 = w[1], w2 = w[2];
        return Loops::merge(rule, r, length, [=](int k, int64_t c) {
          const int64_t q = k * plane + c;
          return w0 * m0[q] + w1 * m1[q] + w2 * m2[q];
        });
      }
      for (int k = 0; k < kMessages; ++k) {
        const T* const of_all = messages + k * plane;
        weighted_sum([=](int64_t q) { return of_all + columns[q] * kTileWidth; }, w, count, kTile,
                     mixed + k * kTileWidth);
      }
    }
    Loops::merge(rule, r, length, [=](int k, int64_t c) { return source[k * step + c]; });
  }

  template <class Length>
  static QGM_HD void tile(const GossipStepArguments& a, const Rule& rule, int64_t begin, Length length, T* memory) {
    const Scratch scratch(a, memory);
    const StoredRows<T> rows = stored(a);
    const BlockSums<T> sums{scratch.lanes, a.block_sums, a.rows, a.cols};
    int64_t due = 0;
    for (int64_t i = 0; i <= a.rows; ++i) {
      if (i < a.rows) {
        if (a.rows > 1) prefetch(a, begin + prefetch_tiles(a.rows) * kTileWidth, i);
        const Row r = row(a, i, begin, scratch);
        if (rows.staged()) {
          rows.load(x_at(a, i, begin), length, r.x);
          rows.load(g_at(a, i, begin), length, const_cast<T*>(r.g));
        }
        Values<T*, kMessages> out;
        for (int k = 0; k < kMessages; ++k) out[k] = scratch.messages + (k * a.rows + i) * kTileWidth;
        Loops::local(for_row(rule, static_cast<const T*>(a.row_scalars), i), r, length, out);
      } else if (a.mixing.form == MixingForm::kMean) {
        for (int k = 0; k < kMessages; ++k) {
          const T* const of_all = scratch.messages + k * a.rows * kTileWidth;
          mean([=](int64_t q) { return of_all + q * kTileWidth; }, a.rows, kTile, scratch.mixed + k * kTileWidth);
        }
      }
      for (; due < a.rows && a.order[due].last <= i; ++due) {
        const int64_t ready = a.order[due].row;
        const Row r = row(a, ready, begin, scratch);
        mix_and_merge(a, for_row(rule, static_cast<const T*>(a.row_scalars), ready), ready, r, length, scratch.messages,
                      scratch.mixed);
        if constexpr (kHasNorm<Rule>) sums.add(ready, begin, r.state[kNormState<Rule>], length);
        if (rows.staged()) rows.store(r.x, length, x_at(a, ready, begin));
      }
    }
    if constexpr (kHasNorm<Rule>) sums.close(begin + length);
  }

  // Whole tiles [first, last) of the sweep.
  static QGM_HD void run(const GossipStepArguments& a, int64_t first, int64_t last, T* scratch) {
    const Rule rule(a.hyper);
    for (int64_t t = first; t < last; ++t) tile(a, rule, t * kTileWidth, kTile, scratch);
  }

  // The short tile at the end of the rows: once a call, so one version for all SIMD levels is enough.
  __attribute__((noinline)) static void run_rest(const GossipStepArguments& a, int64_t begin, T* scratch) {
    tile(a, Rule(a.hyper), begin, a.cols - begin, scratch);
  }
};

template <template <class> class RuleOf, class Compute>
void gossip_tiles(const GossipStepArguments& a) {
  using Tile = GossipTile<RuleOf, Compute>;
  const int64_t whole = a.cols / kGossipTileWidth, tiles = (a.cols + kGossipTileWidth - 1) / kGossipTileWidth;
  constexpr int64_t kShare = kShareTiles<typename Tile::Rule, kGossipTileWidth>;
  const int64_t shares = (tiles + kShare - 1) / kShare;
  const int threads = threads_for(a.rows * a.cols, shares, a.threads);
  // Zeroed, because the mixing loops run over whole tiles, the unused end of the last one included.
  const int64_t per_thread = Tile::Scratch::size(a, Tile::stored(a).staged());
  const ScratchBuffer<Compute> scratch(threads * per_thread);
  parallel_for(shares, threads, [&](int thread, int64_t first, int64_t last) {
    Compute* const mine = scratch.data() + thread * per_thread;
    const int64_t end = std::min(last * kShare, tiles);
    SimdLevels<Tile, const GossipStepArguments&, int64_t, int64_t, Compute*>::run(a.simd, a, first * kShare,
                                                                                  std::min(end, whole), mine);
    if (end > whole) Tile::run_rest(a, whole * kGossipTileWidth, mine);
  });
}

template <template <class> class RuleOf, class Storage>
void gossip_step(const GossipStepArguments& a) {
  GossipStepArguments typed = a;
  typed.storage = kDTypeOf<Storage>;
  const std::vector<MergeTurn> order = merge_order(a);
  typed.order = order.data();
  gossip_tiles<RuleOf, Compute<Storage>>(typed);
}

}  // namespace qgm::cpu
