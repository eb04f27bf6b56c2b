// The fused stacked pass: n workers' local step, gossip averaging and merge in one sweep.
//
// The sweep goes tile by tile over the coordinates. A tile is a few cache lines of all n workers:
//   1. local:  x, g and the state of each worker make its message, kept in a scratch tile;
//   2. mix:    sum_j w_ij message_j for one worker, from the scratch tile;
//   3. merge:  the new x and state of that worker, stored in place.
// What 3 reads again (x, state) was read in 1 and is still in cache, so memory sees every number once.
// Workers of later rows need only messages, never x, so writing in place is safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../arguments.h"
#include "parallel.h"
#include "rule_loops.h"
#include "scratch.h"
#include "simd.h"

namespace qgm::cpu {

struct GossipStepArguments : qgm::GossipStepArguments {
  int threads;
  Simd simd;
};

// Coordinates in a tile. Long enough that the loop set-up of a row is paid back, short enough that
// the tile of 16 workers stays in a 32 KiB L1 and that of 256 in a 1 MiB L2.
constexpr std::integral_constant<int64_t, 128> kTile{};
constexpr int64_t kTileWidth = kTile;
constexpr int64_t kPrefetchTiles = 2;

template <template <class> class RuleOf, class Storage>
struct GossipTile {
  using Loops = RuleLoops<RuleOf, Storage>;
  using T = typename Loops::T;
  using Rule = typename Loops::Rule;
  using Row = typename Loops::Row;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kMessages = Rule::kMessages;

  static QGM_HD Row row(const GossipStepArguments& a, int64_t i, int64_t begin) {
    Row r;
    r.x = static_cast<Storage*>(a.x) + i * a.x_stride + begin;
    r.g = static_cast<const Storage*>(a.g) + i * a.g_stride + begin;
    for (int k = 0; k < kStates; ++k) {
      r.state[k] = static_cast<T*>(a.state[k]) + i * a.state_stride + begin;
    }
    return r;
  }

  // Asks for a tile ahead of its use. The rows of a tile are too short for the hardware prefetcher to
  // learn; into L2, because the tiles in between would push it out of L1.
  static QGM_HD void prefetch(const GossipStepArguments& a, int64_t begin, int64_t i) {
    const int64_t length = std::min(kTileWidth, a.cols - begin);
    const Row r = row(a, i, begin);
    constexpr int64_t kLine = 64;
    for (int64_t c = 0; c < length; c += kLine / int64_t(sizeof(Storage))) {
      __builtin_prefetch(r.x + c, 0, 2);
      __builtin_prefetch(r.g + c, 0, 2);
    }
    for (int k = 0; k < kStates; ++k) {
      for (int64_t c = 0; c < length; c += kLine / int64_t(sizeof(T))) {
        __builtin_prefetch(r.state[k] + c, 0, 2);
      }
    }
  }

  // Mixes the messages of the tile for worker i and merges them into its row.
  template <class Length>
  static QGM_HD void mix_and_merge(const GossipStepArguments& a, const Rule& rule, int64_t i, const Row& r,
                                   Length length, const T* messages, T* mixed) {
    const int64_t plane = a.rows * kTileWidth;  // from message k to message k + 1
    if (a.mixing.form == MixingForm::kIdentity) {
      const T* own = messages + i * kTileWidth;
      return Loops::merge(rule, r, length, [=](int k, int64_t c) { return own[k * plane + c]; });
    }
    if (a.mixing.form != MixingForm::kMean) {
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
    Loops::merge(rule, r, length, [=](int k, int64_t c) { return mixed[k * kTileWidth + c]; });
  }

  template <class Length>
  static QGM_HD void tile(const GossipStepArguments& a, const Rule& rule, int64_t begin, Length length, T* scratch) {
    T* const messages = scratch;                                 // [kMessages, rows, kTileWidth]
    T* const mixed = scratch + kMessages * a.rows * kTileWidth;  // [kMessages, kTileWidth]
    for (int64_t i = 0; i < a.rows; ++i) {
      prefetch(a, begin + kPrefetchTiles * kTileWidth, i);
      Values<T*, kMessages> out;
      for (int k = 0; k < kMessages; ++k) out[k] = messages + (k * a.rows + i) * kTileWidth;
      Loops::local(rule, row(a, i, begin), length, out);
    }
    if (a.mixing.form == MixingForm::kMean) {
      for (int k = 0; k < kMessages; ++k) {
        const T* const of_all = messages + k * a.rows * kTileWidth;
        mean([=](int64_t q) { return of_all + q * kTileWidth; }, a.rows, kTile, mixed + k * kTileWidth);
      }
    }
    for (int64_t i = 0; i < a.rows; ++i) {
      mix_and_merge(a, rule, i, row(a, i, begin), length, messages, mixed);
    }
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

template <template <class> class RuleOf, class Storage>
void gossip_step(const GossipStepArguments& a) {
  using Tile = GossipTile<RuleOf, Storage>;
  using T = typename Tile::T;
  const int64_t whole = a.cols / kTileWidth, tiles = (a.cols + kTileWidth - 1) / kTileWidth;
  const int threads = threads_for(a.rows * a.cols, tiles, a.threads);
  // Zeroed, because the mixing loops run over whole tiles, the unused end of the last one included.
  const int64_t per_thread = Tile::kMessages * (a.rows + 1) * kTileWidth;
  const ScratchBuffer<T> scratch(threads * per_thread);
  parallel_for(tiles, threads, [&](int thread, int64_t first, int64_t last) {
    T* const mine = scratch.data() + thread * per_thread;
    SimdLevels<Tile, const GossipStepArguments&, int64_t, int64_t, T*>::run(a.simd, a, first, std::min(last, whole),
                                                                        mine);
    if (last > whole) Tile::run_rest(a, whole * kTileWidth, mine);
  });
}

}  // namespace qgm::cpu
