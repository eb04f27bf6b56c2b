// The fused stacked pass of RelaySum: every number, per-edge messages included, is read and written once.
//
// A tree has edges in both directions, 2 (n - 1) of them, each with a message that stays from step to step:
//   m_new(s -> i) = h_s + sum of m(l -> s) over the neighbours l of s but i      (m of the last step)
//   mixed_i = (count_i h_i + sum_s m_new(s -> i)) / n
// h_s is the message of the rule's local(); merge() takes mixed_i. Coordinate c belongs to tree c mod K.
// As in gossip_step.h the sweep goes tile by tile: local, relay, merge; the new messages of a tile are
// kept in scratch until all of them are made, because each needs old ones.
//
// Source: Vogels et al., "RelaySum for Decentralized Deep Learning" (NeurIPS 2021, arXiv 2110.04175).
#pragma once

#include "../relay.h"
#include "gossip_step.h"

namespace qgm::cpu {

struct RelayStepArguments : GossipStepArguments, RelayArguments {
  int64_t edges() const { return 2 * (rows - 1); }
};

// Wider than a gossip tile: all rows wait for all messages here, and each edge has a loop of its own.
constexpr int64_t kRelayTileWidth = 128;

template <template <class> class RuleOf, class Compute>
struct RelayTile {
  using Tile = GossipTile<RuleOf, Compute, kRelayTileWidth>;
  using Loops = typename Tile::Loops;
  using T = Compute;
  using Rule = typename Loops::Rule;
  static_assert(Rule::kMessages == 1, "a relay carries one message");

  // Scratch of the gossip tile (its messages are h), then the new messages [edges, kRelayTileWidth].
  static int64_t scratch_size(const RelayStepArguments& a, bool staged) {
    return Tile::Scratch::size(a, staged) + a.edges() * kRelayTileWidth;
  }

  static QGM_HD T* message_at(const RelayStepArguments& a, int64_t e, int64_t begin) {
    return static_cast<T*>(a.message) + e * a.message_stride + begin;
  }

  // sum += row, on the coordinates of one tree.
  static QGM_HD void add(const T* row, int64_t first, int64_t step, int64_t length, T* sum) {
    if (step == 1) {
      QGM_INDEPENDENT_ITERATIONS
      for (int64_t c = 0; c < length; ++c) sum[c] = sum[c] + row[c];
    } else {
      QGM_INDEPENDENT_ITERATIONS
      for (int64_t c = first; c < length; c += step) sum[c] = sum[c] + row[c];
    }
  }

  static QGM_HD void relay(const RelayStepArguments& a, int64_t k, int64_t begin, int64_t length, const T* h, T* fresh,
                           T* mixed) {
    const int32_t* const offsets = a.offsets + k * (a.rows + 1);
    const int32_t* const senders = a.senders + k * a.edges();
    const int32_t* const reverse = a.reverse + k * a.edges();
    const int64_t step = a.trees, first = ((k - begin) % step + step) % step;
    for (int64_t i = 0; i < a.rows; ++i) {
      const T count = static_cast<const T*>(a.counts)[k * a.rows + i];
      T* const total = mixed + i * kRelayTileWidth;
      for (int64_t c = first; c < length; c += step) total[c] = count * h[i * kRelayTileWidth + c];
      for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
        const int64_t s = senders[e];
        T* const sum = fresh + e * kRelayTileWidth;
        for (int64_t c = first; c < length; c += step) sum[c] = h[s * kRelayTileWidth + c];
        for (int64_t f = offsets[s]; f < offsets[s + 1]; ++f) {
          if (f != reverse[e]) add(message_at(a, f, begin), first, step, length, sum);
        }
        add(sum, first, step, length, total);
      }
    }
  }

  static QGM_HD void tile(const RelayStepArguments& a, const Rule& rule, int64_t begin, int64_t length, T* memory,
                          T* mixed) {
    const typename Tile::Scratch scratch(a, memory);
    T* const fresh = memory + Tile::Scratch::size(a, Tile::stored(a).staged());
    const StoredRows<T> rows = Tile::stored(a);
    for (int64_t i = 0; i < a.rows; ++i) {
      Tile::prefetch(a, begin + prefetch_tiles(a.rows) * kRelayTileWidth, i);
      const auto r = Tile::row(a, i, begin, scratch);
      if (rows.staged()) {
        rows.load(Tile::x_at(a, i, begin), length, r.x);
        rows.load(Tile::g_at(a, i, begin), length, const_cast<T*>(r.g));
      }
      Values<T*, 1> out{{scratch.messages + i * kRelayTileWidth}};
      Loops::local(rule, r, length, out);
    }
    for (int64_t k = 0; k < a.trees; ++k) relay(a, k, begin, length, scratch.messages, fresh, mixed);
    for (int64_t e = 0; e < a.edges(); ++e) {
      std::copy(fresh + e * kRelayTileWidth, fresh + e * kRelayTileWidth + length, message_at(a, e, begin));
    }
    const T share = T(1) / T(a.rows);
    for (int64_t i = 0; i < a.rows; ++i) {
      const auto r = Tile::row(a, i, begin, scratch);
      const T* const total = mixed + i * kRelayTileWidth;
      Loops::merge(rule, r, length, [=](int, int64_t c) { return total[c] * share; });
      if (rows.staged()) rows.store(r.x, length, Tile::x_at(a, i, begin));
    }
  }

  static QGM_HD void run(const RelayStepArguments& a, int64_t first, int64_t last, T* scratch, T* mixed) {
    const Rule rule(a.hyper);
    for (int64_t begin = first * kRelayTileWidth; begin < std::min(a.cols, last * kRelayTileWidth);
         begin += kRelayTileWidth) {
      tile(a, rule, begin, std::min(kRelayTileWidth, a.cols - begin), scratch, mixed);
    }
  }
};

template <template <class> class RuleOf, class Storage>
void relay_step(const RelayStepArguments& a) {
  using T = Compute<Storage>;
  using Tile = RelayTile<RuleOf, T>;
  RelayStepArguments typed = a;
  typed.storage = kDTypeOf<Storage>;
  const int64_t tiles = (a.cols + kRelayTileWidth - 1) / kRelayTileWidth;
  const int threads = threads_for(a.rows * a.cols, tiles, a.threads);
  const int64_t own = Tile::scratch_size(typed, Tile::Tile::stored(typed).staged());
  const int64_t per_thread = own + a.rows * kRelayTileWidth;
  const ScratchBuffer<T> scratch(threads * per_thread);
  parallel_for(tiles, threads, [&](int thread, int64_t first, int64_t last) {
    T* const mine = scratch.data() + thread * per_thread;
    SimdLevels<Tile, const RelayStepArguments&, int64_t, int64_t, T*, T*>::run(a.simd, typed, first, last, mine,
                                                                               mine + own);
  });
}

}  // namespace qgm::cpu
