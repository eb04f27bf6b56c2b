// The fused stacked pass of RelaySum: every number, per-edge messages included, is read and written once.
//
// A tree has edges in both directions, 2 (n - 1) of them, each with a message that stays from step to step:
//   m_new(s -> i) = h_s + sum of m(l -> s) over the neighbours l of s but i      (m of the last step)
//   mixed_i = (count_i h_i + sum_s m_new(s -> i)) / n
// h_s is the message of the rule's local(); merge() takes mixed_i. Coordinate c belongs to tree c mod K.
// As in gossip_step.h the sweep goes tile by tile, first the local steps of all workers; then, chunk by chunk, relay
// and merge. The new messages of a chunk are kept in scratch until all of them are made, because each needs old ones.
//
// Source: Vogels et al., "RelaySum for Decentralized Deep Learning" (NeurIPS 2021, arXiv 2110.04175).
#pragma once

#include "../relay.h"
#include "gossip_step.h"

namespace qgm::cpu {

struct RelayStepArguments : GossipStepArguments, RelayArguments {
  int64_t edges() const { return 2 * (rows - 1); }
};

// Coordinates in a tile: as all rows wait for all messages here, what they hold must stay in L2.
inline int64_t relay_tile_width(int64_t rows) {
  constexpr int64_t kInCache = int64_t(1) << 14;  // coordinates of x, g, state and messages together
  return std::clamp(kInCache / rows / kChunkWidth * kChunkWidth, kChunkWidth, kTileWidth);
}

template <template <class> class RuleOf, class Compute>
struct RelayTile {
  using Rows = TileRows<RuleOf, Compute>;
  using Loops = typename Rows::Loops;
  using T = Compute;
  using Rule = typename Rows::Rule;
  static_assert(Rule::kMessages == 1 && !kHasNorm<Rule>, "a relay carries one message and gives no norm");

  // A thread's scratch: h [rows, kTileWidth], the new messages [edges, kChunkWidth], mixed [rows, kChunkWidth], and
  // what TileRows keeps.
  struct Scratch {
    T *h, *fresh, *mixed, *rows;

    QGM_HD Scratch(const RelayStepArguments& a, T* memory)
        : h(memory),
          fresh(h + a.rows * kTileWidth),
          mixed(fresh + a.edges() * kChunkWidth),
          rows(mixed + a.rows * kChunkWidth) {}

    static int64_t size(const RelayStepArguments& a) {
      return a.rows * kTileWidth + (a.edges() + a.rows) * kChunkWidth + Rows::size(a, a.rows);
    }
  };

  static QGM_HD T* message_at(const RelayStepArguments& a, int64_t e, int64_t begin) {
    return static_cast<T*>(a.message) + e * a.message_stride + begin;
  }

  // Asks for a chunk of the messages of two edges: there are twice as many edges as rows.
  static QGM_HD void prefetch_messages(const RelayStepArguments& a, int64_t i, int64_t begin) {
    for (int64_t e = i; e < a.edges(); e += a.rows) {
      prefetch_run(message_at(a, e, begin), std::min(kChunkWidth, a.cols - begin));
    }
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

  // `chunk` coordinates from `begin` on, of which h is at the first; tree[c] is that of coordinate begin + c.
  template <bool kOneTree, class Chunk>
  static QGM_HD void relay(const RelayStepArguments& a, int32_t k, const int32_t* tree, int64_t begin, Chunk chunk,
                           const T* h, T* fresh, T* mixed) {
    const int32_t* const offsets = a.offsets + k * (a.rows + 1);
    const int32_t* const senders = a.senders + k * a.edges();
    const int32_t* const reverse = a.reverse + k * a.edges();
    for (int64_t i = 0; i < a.rows; ++i) {
      const T count = static_cast<const T*>(a.counts)[k * a.rows + i];
      const T* const own = h + i * kTileWidth;
      T* const total = mixed + i * kChunkWidth;
      keep<kOneTree>(tree, k, chunk, total, [=](int64_t c) { return count * own[c]; });
      for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
        const int64_t s = senders[e];
        T* const sum = fresh + e * kChunkWidth;
        const T *so_far = h + s * kTileWidth, *last = nullptr;
        for (int64_t f = offsets[s]; f < offsets[s + 1]; ++f) {
          if (f == reverse[e]) continue;
          if (last != nullptr) {
            keep<kOneTree>(tree, k, chunk, sum, [=](int64_t c) { return so_far[c] + last[c]; });
            so_far = sum;
          }
          last = message_at(a, f, begin);
        }
        const int64_t width = chunk;
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

  template <class Chunk>
  static QGM_HD void relay_trees(const RelayStepArguments& a, int64_t begin, Chunk chunk, const T* h, T* fresh,
                                 T* mixed) {
    if (a.trees == 1) return relay<true>(a, 0, nullptr, begin, chunk, h, fresh, mixed);
    int32_t tree[kChunkWidth];
    int32_t next = int32_t(begin % a.trees);
    for (int32_t& k : tree) {
      k = next;
      next = next + 1 < a.trees ? next + 1 : 0;
    }
    for (int32_t k = 0; k < a.trees; ++k) relay<false>(a, k, tree, begin, chunk, h, fresh, mixed);
  }

  // Coordinates [begin, begin + length); `chunk` divides length.
  template <class Chunk>
  static QGM_HD void tile(const RelayStepArguments& a, const Rule& rule, int64_t begin, int64_t length, Chunk chunk,
                          T* memory) {
    const Scratch scratch(a, memory);
    const Rows rows(a, a.rows, scratch.rows);
    for (int64_t i = 0; i < a.rows; ++i) {
      const auto r = rows.row(i, begin, i);
      const NextRow next(a.rows, i, begin, length);
      rows.load(r, i, begin, length);
      for (int64_t c = 0; c < length; c += chunk) {
        prefetch_messages(a, i, begin + c);
        rows.prefetch(next.i, next.begin + c);
        Loops::local(rule, r.from(c), chunk, Values<T*, 1>{{scratch.h + i * kTileWidth + c}});
      }
    }
    const T share = T(1) / T(a.rows);
    for (int64_t c = 0; c < length; c += chunk) {
      relay_trees(a, begin + c, chunk, scratch.h + c, scratch.fresh, scratch.mixed);
      for (int64_t e = 0; e < a.edges(); ++e) {
        std::copy_n(scratch.fresh + e * kChunkWidth, int64_t(chunk), message_at(a, e, begin + c));
      }
      for (int64_t i = 0; i < a.rows; ++i) {
        const T* const total = scratch.mixed + i * kChunkWidth;
        const auto r = rows.row(i, begin, i).from(c);
        Loops::merge(rule, r, chunk, [=](int, int64_t l) { return total[l] * share; });
        rows.store(r, i, begin + c, chunk);
      }
    }
  }

  // Coordinates [first, last), whole chunks.
  static QGM_HD void run(const RelayStepArguments& a, int64_t first, int64_t last, T* scratch) {
    const Rule rule(a.hyper);
    const int64_t width = relay_tile_width(a.rows);
    for (int64_t begin = first; begin < last; begin += width) {
      tile(a, rule, begin, std::min(width, last - begin), kChunk, scratch);
    }
  }

  // The short chunk at the end of the rows.
  __attribute__((noinline)) static void run_rest(const RelayStepArguments& a, int64_t begin, T* scratch) {
    tile(a, Rule(a.hyper), begin, a.cols - begin, a.cols - begin, scratch);
  }
};

template <template <class> class RuleOf, class Storage>
void relay_step(const RelayStepArguments& a) {
  using T = Compute<Storage>;
  using Tile = RelayTile<RuleOf, T>;
  RelayStepArguments typed = a;
  typed.storage = kDTypeOf<Storage>;
  run_in_shares<Tile, T>(typed, a.rows, a.cols, kChunkWidth, kChunkWidth, Tile::Scratch::size(typed));
}

}  // namespace qgm::cpu
