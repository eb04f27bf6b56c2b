// The fused stacked pass: n workers' local step, gossip averaging and merge in one sweep.
//
// The sweep goes tile by tile over the coordinates, and in a tile worker by worker:
//   1. local:  x, g and the state of each worker make its message, kept in scratch;
//   2. mix:    sum_j w_ij message_j for one worker, from scratch;
//   3. merge:  the new x and state of that worker, stored in place.
// 2 and 3 follow for a worker as soon as the messages of all its neighbours are there (merge_plan.h).
// What 3 reads again (x, state) was read in 1 and is still in cache, so memory sees every number once.
// Workers of later rows need only messages, never x, so writing in place is safe.
// A rule's norm is summed from what 3 stores, while it is in L1; a thread's share is then whole blocks of coordinates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../arguments.h"
#include "merge_plan.h"
#include "reduce.h"
#include "rule_loops.h"
#include "shares.h"
#include "simd.h"
#include "storage.h"

namespace qgm::cpu {

struct GossipStepArguments : qgm::GossipStepArguments {
  int threads;
  Simd simd;
  DType storage;          // of x and g; set by gossip_step
  const MergePlan* plan;  // set by gossip_step
};

// Coordinates of one loop: a constant, so the compiler drops the remainder loops.
constexpr std::integral_constant<int64_t, 64> kChunk{};
constexpr int64_t kChunkWidth = kChunk;
// Coordinates of a worker in a tile. Long, because memory is fast only where it is read and written in long runs; short
// enough that the rows which wait for messages, a few on a sparse graph, are in L1.
constexpr int64_t kTileWidth = 512;
static_assert(kTileWidth % kChunkWidth == 0);
// Coordinates in the smallest share of a thread, of a pass in pieces of kPiece.
template <class Rule, int64_t kPiece>
constexpr int64_t kSmallestShare = kHasNorm<Rule> ? kReduceBlock : kPiece;

// Where the sweep goes after worker i of the tile at `begin`: so far ahead rows are asked for. A run in one row is too
// short for the hardware prefetcher to learn.
struct NextRow {
  int64_t i, begin;

  QGM_HD NextRow(int64_t rows, int64_t i_now, int64_t begin_now, int64_t tile_width)
      : i(i_now + 1 < rows ? i_now + 1 : 0), begin(i_now + 1 < rows ? begin_now : begin_now + tile_width) {}
};

template <class T>
QGM_HD void prefetch_run(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t c = 0; c < count; c += kLine) __builtin_prefetch(from + c, 0, 2);
}

// The rows of a tile, as gossip (below) and relays (relay_step.h) go over them.
template <template <class> class RuleOf, class Compute>
struct TileRows {
  using Loops = RuleLoops<RuleOf, Compute>;
  using T = Compute;
  using Rule = typename Loops::Rule;
  using Row = typename Loops::Row;
  static constexpr int kStates = Rule::kStates;

  const GossipStepArguments& a;
  T *x, *g;  // for 16-bit storage: [places, kTileWidth], or one place of what merge does not read again

  QGM_HD TileRows(const GossipStepArguments& arguments, int64_t places, T* memory)
      : a(arguments), x(memory), g(memory + (Rule::kMergeReadsX ? places : 1) * kTileWidth) {}

  static int64_t size(const GossipStepArguments& a, int64_t places) {
    if (!StoredRows<T>{a.storage, a.simd}.staged()) return 0;
    return ((Rule::kMergeReadsX ? places : 1) + (Rule::kMergeReadsGrad ? places : 1)) * kTileWidth;
  }

  QGM_HD StoredRows<T> stored() const { return {a.storage, a.simd}; }

  QGM_HD char* x_at(int64_t i, int64_t begin) const {
    return stored().at(static_cast<char*>(a.x), i * a.x_stride + begin);
  }

  QGM_HD const char* g_at(int64_t i, int64_t begin) const {
    return stored().at(static_cast<const char*>(a.g), i * a.g_stride + begin);
  }

  // Worker i from coordinate `begin` on. It keeps its place until it is merged.
  QGM_HD Row row(int64_t i, int64_t begin, int64_t place) const {
    Row r;
    if (stored().staged()) {
      r.x = x + (Rule::kMergeReadsX ? place : 0) * kTileWidth;
      r.g = g + (Rule::kMergeReadsGrad ? place : 0) * kTileWidth;
    } else {
      r.x = reinterpret_cast<T*>(x_at(i, begin));
      r.g = reinterpret_cast<const T*>(g_at(i, begin));
    }
    for (int k = 0; k < kStates; ++k) {
      r.state[k] = static_cast<T*>(a.state[k]) + i * a.state_stride + begin;
    }
    return r;
  }

  QGM_HD void load(const Row& r, int64_t i, int64_t begin, int64_t length) const {
    if (!stored().staged()) return;
    stored().load(x_at(i, begin), length, r.x);
    stored().load(g_at(i, begin), length, const_cast<T*>(r.g));
  }

  QGM_HD void store(const Row& r, int64_t i, int64_t begin, int64_t length) const {
    if (stored().staged()) stored().store(r.x, length, x_at(i, begin));
  }

  // Asks for a chunk of a row.
  QGM_HD void prefetch(int64_t i, int64_t begin) const {
    const int64_t length = std::min(kChunkWidth, a.cols - begin);
    prefetch_run(x_at(i, begin), length * stored().bytes());
    prefetch_run(g_at(i, begin), length * stored().bytes());
    for (int k = 0; k < kStates; ++k) {
      prefetch_run(static_cast<const T*>(a.state[k]) + i * a.state_stride + begin, length);
    }
  }
};

template <template <class> class RuleOf, class Compute>
struct GossipTile {
  using Rows = TileRows<RuleOf, Compute>;
  using Loops = typename Rows::Loops;
  using T = Compute;
  using Rule = typename Rows::Rule;
  using Row = typename Rows::Row;
  static constexpr int kMessages = Rule::kMessages;
  static_assert(kReduceLanes % kChunkWidth == 0 && kReduceBlock % kTileWidth == 0, "a chunk lies in one row of lanes");

  // A thread's scratch: messages [kMessages, places, kTileWidth], mixed [kMessages, kTileWidth], the lanes of the
  // rule's norm [rows, kReduceLanes], and what TileRows keeps.
  struct Scratch {
    T *messages, *mixed, *lanes, *rows;

    QGM_HD Scratch(const GossipStepArguments& a, T* memory)
        : messages(memory),
          mixed(messages + kMessages * a.plan->places * kTileWidth),
          lanes(mixed + kMessages * kTileWidth),
          rows(lanes + lanes_of(a.rows)) {}

    static QGM_HD int64_t lanes_of(int64_t rows) { return kHasNorm<Rule> ? rows * kReduceLanes : 0; }

    static int64_t size(const GossipStepArguments& a) {
      return kMessages * (a.plan->places + 1) * kTileWidth + lanes_of(a.rows) + Rows::size(a, a.plan->places);
    }
  };

  // Merges mixed messages into a row, of which mixed(at)(k, c) is message k at coordinate at + c; merged(at) after each
  // chunk.
  template <class Chunk, class Mixed, class Merged>
  static QGM_HD void merge_chunks(Rule rule, Row r, int64_t length, Chunk chunk, const Mixed& mixed,
                                  const Merged& merged) {
    for (int64_t at = 0; at < length; at += chunk) {
      Loops::merge(rule, r.from(at), chunk, mixed(at));
      merged(at);
    }
  }

  // Mixes the messages of the tile for worker i and merges them into its row; merged(c) after each chunk.
  template <class Chunk, class Merged>
  static QGM_HD void mix_and_merge(const GossipStepArguments& a, const Rule& rule, int64_t i, const Row& r,
                                   int64_t length, Chunk chunk, const Scratch& scratch, const Merged& merged) {
    const int64_t plane = a.plan->places * kTileWidth;  // from message k to message k + 1
    const int32_t* const place = a.plan->place.data();
    const auto message = [=](int64_t j) { return scratch.messages + place[j] * kTileWidth; };
    if (a.mixing.form == MixingForm::kIdentity || a.mixing.form == MixingForm::kMean) {
      const bool mean = a.mixing.form == MixingForm::kMean;
      const T* const source = mean ? scratch.mixed : message(i);
      const int64_t step = mean ? kTileWidth : plane;
      const auto mixed = [=](int64_t at) { return [=](int k, int64_t c) { return source[k * step + at + c]; }; };
      return merge_chunks(rule, r, length, chunk, mixed, merged);
    }
    const int64_t start = a.mixing.row_offsets[i], count = a.mixing.row_offsets[i + 1] - start;
    const int32_t* const columns = a.mixing.columns + start;
    const T* const w = static_cast<const T*>(a.mixing.weights) + start;
    if (count == 3) {  // a ring: the sum stays in registers
      const T *m0 = message(columns[0]), *m1 = message(columns[1]), *m2 = message(columns[2]);
      const T w0 = w[0], w1 = w[1], w2 = w[2];
      const auto mixed = [=](int64_t at) {
        return [=](int k, int64_t c) {
          const int64_t q = k * plane + at + c;
          return w0 * m0[q] + w1 * m1[q] + w2 * m2[q];
        };
      };
      return merge_chunks(rule, r, length, chunk, mixed, merged);
    }
    T* const sums = scratch.mixed;
    const auto mixed = [=](int64_t at) {
      for (int k = 0; k < kMessages; ++k) {
        const int64_t first = k * plane + at;
        weighted_sum([=](int64_t q) { return message(columns[q]) + first; }, w, count, chunk, sums + k * kTileWidth);
      }
      return [=](int k, int64_t c) { return sums[k * kTileWidth + c]; };
    };
    merge_chunks(rule, r, length, chunk, mixed, merged);
  }

  // Coordinates [begin, begin + length) of all workers; `chunk` divides length.
  template <class Chunk>
  static QGM_HD void tile(const GossipStepArguments& a, const Rule& rule, int64_t begin, int64_t length, Chunk chunk,
                          T* memory) {
    const MergePlan& plan = *a.plan;
    const Scratch scratch(a, memory);
    const Rows rows(a, plan.places, scratch.rows);
    const BlockSums<T> sums{scratch.lanes, a.block_sums, a.rows, a.cols};
    const int64_t plane = plan.places * kTileWidth;
    auto due = plan.turns.begin();
    for (int64_t i = 0; i <= a.rows; ++i) {
      if (i < a.rows) {
        const Row r = rows.row(i, begin, plan.place[size_t(i)]);
        const Rule own = for_row(rule, static_cast<const T*>(a.row_scalars), i);
        const NextRow next(a.rows, i, begin, kTileWidth);
        T* const message = scratch.messages + plan.place[size_t(i)] * kTileWidth;
        rows.load(r, i, begin, length);
        for (int64_t c = 0; c < length; c += chunk) {
          rows.prefetch(next.i, next.begin + c);
          Values<T*, kMessages> out;
          for (int k = 0; k < kMessages; ++k) out[k] = message + k * plane + c;
          Loops::local(own, r.from(c), chunk, out);
        }
      } else if (a.mixing.form == MixingForm::kMean) {
        for (int64_t c = 0; c < length; c += chunk) {
          for (int k = 0; k < kMessages; ++k) {
            const T* const of_all = scratch.messages + k * plane + c;
            mean([=](int64_t q) { return of_all + q * kTileWidth; }, a.rows, chunk, scratch.mixed + k * kTileWidth + c);
          }
        }
      }
      for (; due != plan.turns.end() && due->after <= i; ++due) {
        const int64_t ready = due->row;
        const Row r = rows.row(ready, begin, plan.place[size_t(ready)]);
        const Rule own = for_row(rule, static_cast<const T*>(a.row_scalars), ready);
        mix_and_merge(a, own, ready, r, length, chunk, scratch, [&](int64_t c) {
          if constexpr (kHasNorm<Rule>) sums.add(ready, begin + c, r.state[kNormState<Rule>] + c, chunk);
        });
        rows.store(r, ready, begin, length);
      }
    }
    if constexpr (kHasNorm<Rule>) sums.close(begin + length);
  }

  // Coordinates [first, last), whole chunks.
  static QGM_HD void run(const GossipStepArguments& a, int64_t first, int64_t last, T* scratch) {
    const Rule rule(a.hyper);
    for (int64_t begin = first; begin < last; begin += kTileWidth) {
      tile(a, rule, begin, std::min(kTileWidth, last - begin), kChunk, scratch);
    }
  }

  // The short chunk at the end of the rows.
  __attribute__((noinline)) static void run_rest(const GossipStepArguments& a, int64_t begin, T* scratch) {
    tile(a, Rule(a.hyper), begin, a.cols - begin, a.cols - begin, scratch);
  }
};

template <template <class> class RuleOf, class Storage>
void gossip_step(const GossipStepArguments& a) {
  GossipStepArguments typed = a;
  typed.storage = kDTypeOf<Storage>;
  const MergePlan plan(a.mixing, a.rows);
  typed.plan = &plan;
  using Tile = GossipTile<RuleOf, Compute<Storage>>;
  constexpr int64_t kShare = kSmallestShare<typename Tile::Rule, kChunkWidth>;
  run_in_shares<Tile, Compute<Storage>>(typed, a.rows, a.cols, kShare, kChunkWidth, Tile::Scratch::size(typed));
}

}  // namespace qgm::cpu
