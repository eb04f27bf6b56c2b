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

// Though all rows wait for all messages here, and each edge has a loop of its own: wider tiles gain on stars only.
constexpr int64_t kRelayTileWidth = kGossipTileWidth;

template <template <class> class RuleOf, class Compute>
struct RelayTile {
  using Tile = GossipTile<RuleOf, Compute, kRelayTileWidth>;
  using Loops = typename Tile::Loops;
  using T = Compute;
  using Rule = typename Loops::Rule;
  static_assert(Rule::kMessages == 1 && !kHasNorm<Rule>, "a relay carries one message and gives no norm");

  // Scratch of the gossip tile (its messages are h), then the new messages [edges, kRelayTileWidth].
  static int64_t scratch_size(const RelayStepArguments& a, bool staged) {
    return Tile::Scratch::size(a, staged) + a.edges() * kRelayTileWidth;
  }

  static QGM_HD T* message_at(const RelayStepArguments& a, int64_t e, int64_t begin) {
    return static_cast<T*>(a.message) + e * a.message_stride + begin;
  }

  static QGM_HD void prefetch_message(const RelayStepArguments& a, int64_t e, int64_t begin) {
    const T* const message = message_at(a, e, begin);
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    for (int64_t c = 0; c < std::min(kRelayTileWidth, a.cols - begin); c += kLine)
      __builtin_prefetch(message + c, 1, 2);
  }

  // out[c] = value(c) for the coordinates of tree k; whole vectors are made also where trees take turns, and of them
  // those of other trees are left out.
  template <bool kOneTree, class Length, class Value>
  static QGM_HD void keep(const int32_t* tree, int32_t k, Length length, T* out, const Value& value) {
    const int64_t count = length;
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) {
      const T made = value(c);
      out[c] = kOneTree || tree[c] == k ? made : out[c];
    }
  }

  template <bool kOneTree, class Length>
  static QGM_HD void relay(const RelayStepArguments& a, int32_t k, const int32_t* tree, int64_t begin, Length length,
                           const T* h, T* fresh, T* mixed) {
    const int32_t* const offsets = a.offsets + k * (a.rows + 1);
    const int32_t* const senders = a.senders + k * a.edges();
    const int32_t* const reverse = a.reverse + k * a.edges();
    for (int64_t i = 0; i < a.rows; ++i) {
      const T count = static_cast<const T*>(a.counts)[k * a.rows + i];
      const T* const own = h + i * kRelayTileWidth;
      T* const total = mixed + i * kRelayTileWidth;
      keep<kOneTree>(tree, k, length, total, [=](int64_t c) { return count * own[c]; });
      for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
        const int64_t s = senders[e];
        T* const sum = fresh + e * kRelayTileWidth;
        const T *so_far = h + s * kRelayTileWidth, *last = nullptr;
        for (int64_t f = offsets[s]; f < offsets[s + 1]; ++f) {
          if (f == reverse[e]) continue;
          if (last != nullptr) {
            keep<kOneTree>(tree, k, length, sum, [=](int64_t c) { return so_far[c] + last[c]; });
            so_far = sum;
          }
          last = message_at(a, f, begin);
        }
        const int64_t width = length;
        QGM_INDEPENDENT_ITERATIONS
        for (int64_t c = 0; c < width; ++c) {
          const bool mine = kOneTree || tree[c] == k;
          const T made = last == nullptr ? so_far[c] : so_far[c] + last[c];
          sum[c] = mine ? made : sum[c];
          total[c] = mine ? total[c] + made : total[c];
        }
      }
    }
  }

  template <class Length>
  static QGM_HD void tile(const RelayStepArguments& a, const Rule& rule, int64_t begin, Length length, T* memory,
                          T* mixed) {
    const typename Tile::Scratch scratch(a, memory);
    T* const fresh = memory + Tile::Scratch::size(a, Tile::stored(a).staged());
    const StoredRows<T> rows = Tile::stored(a);
    const int64_t ahead = begin + prefetch_tiles(a.rows) * kRelayTileWidth;
    for (int64_t e = 0; e < a.edges(); ++e) prefetch_message(a, e, ahead);
    for (int64_t i = 0; i < a.rows; ++i) {
      Tile::prefetch(a, ahead, i);
      const auto r = Tile::row(a, i, begin, scratch);
      if (rows.staged()) {
        rows.load(Tile::x_at(a, i, begin), length, r.x);
        rows.load(Tile::g_at(a, i, begin), length, const_cast<T*>(r.g));
      }
      Values<T*, 1> out{{scratch.messages + i * kRelayTileWidth}};
      Loops::local(rule, r, length, out);
    }
    if (a.trees == 1) {
      relay<true>(a, 0, nullptr, begin, length, scratch.messages, fresh, mixed);
    } else {
      int32_t tree[kRelayTileWidth];
      int32_t next = int32_t(begin % a.trees);
      for (int32_t& k : tree) {
        k = next;
        next = next + 1 < a.trees ? next + 1 : 0;
      }
      for (int32_t k = 0; k < a.trees; ++k) {
        relay<false>(a, k, tree, begin, length, scratch.messages, fresh, mixed);
      }
    }
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
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = t * kRelayTileWidth;
      if (begin + kRelayTileWidth <= a.cols) {
        tile(a, rule, begin, Tile::kTile, scratch, mixed);
      } else {
        tile(a, rule, begin, a.cols - begin, scratch, mixed);
      }
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
