// The relayed pass on a GPU: n workers' local step, RelaySum over K trees (cpu/relay_step.h says what that is) and
// merge in one sweep over the coordinates. Device memory sees x, g, the state and the messages of the last step once.
//
// A block is (lanes, groups): the lanes cover a tile's coordinates, V neighbouring ones each, the groups its rows. What
// all threads of the block need lies in shared memory: h, the message that each worker makes, and for every edge the
// message of the last step and the new one. A tile goes through three phases with a barrier after each:
//   1. every row: h; every edge: the old message comes in;
//   2. every edge s -> i: h_s and the old messages into s but that of i, in ascending order: the new message goes out;
//   3. every row: count h_i and the new messages into i, in ascending order; merge.
// Where a thread has one row (n <= groups, so n <= 32), its x stays in registers from 1 to 3; else merge reads x again,
// from L1 or L2, if the rule needs it. The trees are read through L1, where all lanes ask for one address.
//
// Neighbouring coordinates go over different trees. A thread makes whole vectors for each tree that one of its V
// coordinates has, and keeps of them the coordinates that are that tree's: so all accesses stay 16 bytes wide.
// V = 1 does rows that are aligned differently, and the few coordinates in front of and behind the aligned ones.
#pragma once

#include "gossip_step.h"
#include "relay.h"

namespace qgm::cuda {

template <class Rule, class Storage>
struct RelayParameters {
  using T = Compute<Storage>;

  Storage* x;
  const Storage* g;
  Values<T*, Rule::kStates> state;
  T* message;
  int64_t x_stride, g_stride, state_stride, message_stride;
  int32_t rows, trees;
  const int32_t* offsets;
  const int32_t* senders;
  const int32_t* reverse;
  const T* counts;
  T share;  // 1 / rows
  Rule rule;
  // The coordinates to do: [first, last), but not those of [skip, skip + skipped).
  int64_t first, last, skip, skipped;
};

template <int V, class T>
__device__ __forceinline__ void put(T* p, const Vector<T, V>& v) {
  if constexpr (V == 1) {
    p[0] = v.at[0];
  } else {
    store_shared(p, v);
  }
}

template <class T, int V>
QGM_HD void add(Vector<T, V>& sum, const Vector<T, V>& term) {
  for (int v = 0; v < V; ++v) sum.at[v] = sum.at[v] + term.at[v];
}

// Of V coordinates, the first of which belongs to tree `first`: make(tree) for each tree that occurs, which gives a
// vector, of which the coordinates of that tree are taken.
template <int V, class T, class Make>
QGM_HD Vector<T, V> by_tree(int first, int trees, const Make& make) {
  static_assert(V <= 4);
  Vector<T, V> out = make(first);
#pragma unroll
  for (int u = 1; u < V; ++u) {
    if (u >= trees) break;
    const Vector<T, V> own = make(first + u < trees ? first + u : first + u - trees);
    // Of the tree of u are u, u + K, ...; below 4, with 1 <= u < K, no more than these two.
#pragma unroll
    for (int v = u; v < V; ++v) {
      if (v == u || v - u == trees) out.at[v] = own.at[v];
    }
  }
  return out;
}

template <class Rule, class Storage, int V>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<Rule, Compute<Storage>>)
    relay_tile(const RelayParameters<Rule, Storage> p) {
  using S = Slice<Rule, Storage, V>;
  using T = typename S::T;
  using Vec = Vector<T, V>;
  static_assert(Rule::kMessages == 1, "a relay carries one message");

  const int rows = p.rows, edges = 2 * (rows - 1), trees = p.trees;
  const int width = int(blockDim.x) * V, lane = int(threadIdx.x) * V, group = int(threadIdx.y),
            groups = int(blockDim.y);
  T* const h = reinterpret_cast<T*>(dynamic_shared()) + lane;  // [row, width]
  T* const old = h + int64_t(rows) * width;                    // [edge, width]
  T* const fresh = old + int64_t(edges) * width;               // [edge, width]
  const bool one_row = rows <= groups;
  const int64_t count = p.last - p.first - p.skipped + kFaultTail;
  for (int64_t begin = int64_t(blockIdx.x) * width; begin < count; begin += int64_t(gridDim.x) * width) {
    const bool inside = begin + lane < count;
    int64_t c = p.first + begin + lane;
    if (c >= p.skip) c += p.skipped;
    const int first_tree = trees == 1 ? 0 : int(c % trees);

    S slice;
    const auto load = [&](int64_t i) {
      slice.x = load_vector<V>(p.x + i * p.x_stride + c);
      slice.g = load_vector<V>(p.g + i * p.g_stride + c);
      slice.template load_states<Rule::kLocalReads>(p.state, i * p.state_stride + c);
    };
    if (inside) {
      // The row and the thread's first two edges (a tree has two for each row but one) are under way together.
      const T* message = p.message + group * p.message_stride + c;
      const int64_t next = groups * p.message_stride;
      T* to = old + int64_t(group) * width;
      int e = group;
      load(group);
      if (e + groups < edges) {
        const Vec one = load_vector<V>(message), two = load_vector<V>(message + next);
        put<V>(to, one);
        put<V>(to + groups * width, two);
        message += 2 * next;
        to += 2 * groups * width;
        e += 2 * groups;
      }
#pragma unroll 1
      for (; e < edges; e += groups) {
        put<V>(to, load_vector<V>(message));
        message += next;
        to += groups * width;
      }
      for (int i = group;;) {
        typename S::Messages message;
        slice.local(p.rule, message);
        slice.template store_states<Rule::kLocalWrites>(p.state, i * p.state_stride + c);
        put<V>(h + int64_t(i) * width, message[0]);
        i += groups;
        if (i >= rows) break;
        load(i);
      }
    }
    if (!kFaultNoBarrier) __syncthreads();

    if (inside) {
      for (int e = group; e < edges; e += groups) {
        const Vec made = by_tree<V, T>(first_tree, trees, [&](int k) {
          const int32_t* const offsets = p.offsets + int64_t(k) * (rows + 1);
          const int64_t edge = int64_t(k) * edges + e;
          const int sender = p.senders[edge], back = p.reverse[edge];
          const int end = offsets[sender + 1];
          Vec sum = load_vector<V>(h + int64_t(sender) * width);
#pragma unroll 2
          for (int f = offsets[sender]; f < end; ++f) {
            if (f != back) add(sum, load_vector<V>(old + int64_t(f) * width));
          }
          return sum;
        });
        store_global(p.message + e * p.message_stride + c, made);
        put<V>(fresh + int64_t(e) * width, made);
      }
    }
    if (!kFaultNoBarrier) __syncthreads();

    if (inside) {
      for (int i = group; i < rows; i += groups) {
        typename S::Messages mixed;
        mixed[0] = by_tree<V, T>(first_tree, trees, [&](int k) {
          const int32_t* const offsets = p.offsets + int64_t(k) * (rows + 1);
          const int end = offsets[i + 1];
          Vec sum = product(p.counts[int64_t(k) * rows + i], load_vector<V>(h + int64_t(i) * width));
#pragma unroll 2
          for (int e = offsets[i]; e < end; ++e) add(sum, load_vector<V>(fresh + int64_t(e) * width));
          return product(p.share, sum);
        });
        if (!one_row) {
          if (Rule::kMergeReadsX) slice.x = load_vector<V>(p.x + i * p.x_stride + c);
          if (Rule::kMergeReadsGrad) slice.g = load_vector<V>(p.g + i * p.g_stride + c);
          slice.template load_states<Rule::kMergeReads>(p.state, i * p.state_stride + c);
        }
        slice.merge(p.rule, mixed);
        store_global(p.x + i * p.x_stride + c, slice.x);
        slice.template store_states<Rule::kMergeWrites>(p.state, i * p.state_stride + c);
      }
    }
    if (!kFaultNoBarrier) __syncthreads();  // before the tile is filled again
  }
}

// Where the aligned coordinates of all rows begin; -1 if rows are aligned differently.
template <class Rule, class Storage>
int64_t aligned_begin(const RelayParameters<Rule, Storage>& p) {
  constexpr int V = kVector<Compute<Storage>>;
  const int64_t head = to_alignment(p.x, V);
  bool equal = to_alignment(p.g, V) == head && p.x_stride % V == 0 && p.g_stride % V == 0;
  for (int k = 0; k < Rule::kStates; ++k)
    equal = equal && to_alignment(p.state[k], V) == head && p.state_stride % V == 0;
  if (p.rows > 1) equal = equal && to_alignment(p.message, V) == head && p.message_stride % V == 0;
  return equal ? head : -1;
}

// As many lanes as let a thread have one row, and three blocks a multiprocessor (two, one) have the shared memory;
// at least 32 bytes in a row, a sector, unless only less fits. 0: not even one coordinate of all rows does.
template <class T, int V>
int relay_lanes(const Device& device, int64_t rows, int64_t row_bytes) {
  constexpr int kSector = 32 / (V * int(sizeof(T)));
  int most = 32;
  while (most > 8 && most * rows > kMaxThreads) most /= 2;
  for (int blocks = 3; blocks > 0; --blocks) {
    for (int lanes = most; lanes >= (blocks > 1 ? kSector : 1); lanes /= 2) {
      const int64_t available = device.shared_per_multiprocessor / blocks - device.reserved_shared;
      if (lanes * row_bytes <= std::min(available, device.shared_per_block)) return lanes;
    }
  }
  return 0;
}

template <int V, class Rule, class Storage>
bool relay_coordinates(const Device& device, const RelayParameters<Rule, Storage>& p, cudaStream_t stream) {
  using T = Compute<Storage>;
  const int64_t count = p.last - p.first - p.skipped;
  if (count <= 0) return true;
  const int64_t rows_of_tile = p.rows + 2 * 2 * (int64_t(p.rows) - 1);  // h, and the old and the new messages
  const int64_t lane_bytes = rows_of_tile * V * int64_t(sizeof(T));
  const int lanes = relay_lanes<T, V>(device, p.rows, lane_bytes);
  if (lanes == 0) return false;
  const int groups = int(std::min<int64_t>(p.rows, kMaxThreads / lanes));
  const int64_t width = int64_t(lanes) * V;
  launch("relay_step_", device, relay_tile<Rule, Storage, V>, (count + width - 1) / width, dim3(lanes, groups, 1),
         lanes * lane_bytes, stream, p);
  return true;
}

template <template <class> class RuleOf, class Storage>
void relay_step(const RelayStepArguments& a) {
  using T = Compute<Storage>;
  using Rule = RuleOf<T>;
  const Device device("relay_step_", a.device);
  if (a.rows > INT32_MAX / 2 || a.trees > INT32_MAX) {
    throw std::runtime_error("relay_step_: at most 2^30 workers and 2^31 - 1 trees, got " + std::to_string(a.rows) +
                             " and " + std::to_string(a.trees));
  }
  RelayParameters<Rule, Storage> p{static_cast<Storage*>(a.x),
                                   static_cast<const Storage*>(a.g),
                                   {},
                                   static_cast<T*>(a.message),
                                   a.x_stride,
                                   a.g_stride,
                                   a.state_stride,
                                   a.message_stride,
                                   int32_t(a.rows),
                                   int32_t(a.trees),
                                   a.offsets,
                                   a.senders,
                                   a.reverse,
                                   static_cast<const T*>(a.counts),
                                   T(1) / T(a.rows),
                                   Rule(a.hyper),
                                   0,
                                   a.cols,
                                   a.cols,
                                   0};
  for (int k = 0; k < Rule::kStates; ++k) p.state[k] = static_cast<T*>(a.state[k]);

  constexpr int V = kVector<T>;
  const int64_t head = aligned_begin(p), vectors = head < 0 ? 0 : std::max<int64_t>(0, (a.cols - head) / V);
  p.first = std::max<int64_t>(0, head);
  p.last = p.first + vectors * V;
  if (vectors > 0 && relay_coordinates<V>(device, p, a.stream)) {
    p.skip = head;
    p.skipped = vectors * V;
  }
  p.first = 0;
  p.last = a.cols;
  if (!relay_coordinates<1>(device, p, a.stream)) {
    throw std::runtime_error("relay_step_: one coordinate of all " + std::to_string(a.rows) +
                             " workers and their messages must fit the " + std::to_string(device.shared_per_block) +
                             " bytes of shared memory that a block has on this device");
  }
}

}  // namespace qgm::cuda
