// The fused stacked pass on a GPU: n workers' local step, gossip averaging and merge in one sweep.
//
// gossip_tile: the sweep goes tile by tile over the coordinates. A block is (lanes, groups, tiles):
// the lanes cover a tile's coordinates, 16 bytes of state each; a group of lanes holds kRows workers'
// x, g and state in registers from the load to the store, so device memory sees each number once; only
// the messages pass through shared memory. Two tile buffers take turns, so one barrier a tile is enough:
// a fast warp may load and fill the next tile while a slow one still mixes, but cannot pass the next
// barrier. The mixing matrix is read from shared memory. With n <= kRows a thread owns all workers of its
// coordinates and reads only messages that it wrote itself.
// For a rule's norm (rule.h: kNormState) a block goes down strips of tiles that lie kReduceLanes apart, so that a
// thread always has the same lanes of a reduction and sums their squares in registers; block_sums_of (reduce_kernels.h)
// ends what it leaves. A model too small for enough strips, or rows that don't begin at a vector, are read once more
// there.
//
// gossip_columns: any n, alignment and stride, one coordinate a thread. What merge needs again (x, state)
// is read again, from L1 or L2: the two passes that are left when the rows of all n workers no longer
// fit the registers of a block (n > kRows kMaxThreads / 4, that is 256, or 128 for rules that move many
// vectors) or the mixing matrix no longer fits beside the tile. It also does the few coordinates in front
// of and behind the aligned ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "launch.h"
#include "reduce_kernels.h"
#include "slice.h"

namespace qgm::cuda {

template <class Rule, class Storage>
struct GossipParameters {
  using T = Compute<Storage>;

  Storage* x;
  const Storage* g;
  Values<T*, Rule::kStates> state;
  int64_t x_stride, g_stride, state_stride;
  int32_t rows, nnz;
  MixingForm form;
  const int32_t* row_offsets;
  const int32_t* columns;
  const T* weights;
  const T* row_scalars;  // [rows, kRowScalars]
  T scale;               // 1 / rows
  Rule rule;
  T* lane_sums;    // [rows, blocks, kReduceLanes]: written by gossip_tile, which then goes in strips; or null
  int64_t blocks;  // of a reduction over a row
  // The coordinates to do: [first, last), but not those of [skip, skip + skipped).
  int64_t first, last, skip, skipped;
};

// Three blocks of 256 threads on a multiprocessor leave 80 registers a thread; a rule that moves many vectors or has
// numbers of each worker, or doubles, which take two registers, needs the 128 that two blocks leave.
constexpr int kMaxThreads = 256;
template <class Rule, class T>
constexpr int kMinBlocks =
    sizeof(T) == 8 || kRowScalars<Rule> > 0 || Rule::kMessages > 1 || Rule::kStates + Rule::kMessages > 3 ? 2 : 3;

// Rows a thread holds: enough loads in flight, and few enough registers that nothing spills.
template <class Rule>
constexpr int kRows = count_bits(Traffic<Rule>::kLoads | Traffic<Rule>::kStores) <= 1 ? 4 : 2;

// Where a block keeps what in dynamic shared memory, in bytes.
template <class Rule, class T>
struct TileLayout {
  int64_t columns, offsets, tiles;  // after the weights, which come first
  int64_t buffer;                   // one of a tile's two buffers: messages, then their mean
  int64_t total;

  QGM_HD TileLayout(MixingForm form, int64_t rows, int64_t nnz, int64_t width, int64_t tiles_of_block) {
    const int64_t entries = form == MixingForm::kSparse ? nnz : 0;
    columns = entries * int64_t(sizeof(T));
    offsets = columns + entries * 4;
    tiles = form == MixingForm::kSparse ? (offsets + (rows + 1) * 4 + 15) / 16 * 16 : 0;
    buffer = Rule::kMessages * (rows + (form == MixingForm::kMean ? 1 : 0)) * width * int64_t(sizeof(T));
    total = tiles + tiles_of_block * 2 * buffer;
  }
};

template <class Rule, class Storage>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<Rule, Compute<Storage>>)
    gossip_tile(const GossipParameters<Rule, Storage> p) {
  using S = Slice<Rule, Storage, kVector<Compute<Storage>>>;
  using T = typename S::T;
  constexpr int V = S::V, R = kRows<Rule>, kMessages = Rule::kMessages;
  using Loads = Traffic<Rule>;

  const int rows = p.rows, width = int(blockDim.x) * V;
  const TileLayout<Rule, T> layout(p.form, rows, p.nnz, width, blockDim.z);
  unsigned char* const shared = dynamic_shared();
  T* const weights = reinterpret_cast<T*>(shared);
  int32_t* const columns = reinterpret_cast<int32_t*>(shared + layout.columns);  // bytes into the tile
  int32_t* const offsets = reinterpret_cast<int32_t*>(shared + layout.offsets);
  T* messages = reinterpret_cast<T*>(shared + layout.tiles + threadIdx.z * 2 * layout.buffer);
  T* other = reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(messages) + layout.buffer);
  const int plane = rows * width;  // from message k to message k + 1

  if (p.form == MixingForm::kSparse) {
    const int thread = int((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
    const int threads = int(blockDim.x * blockDim.y * blockDim.z);
    for (int q = thread; q < p.nnz; q += threads) {
      weights[q] = p.weights[q];
      columns[q] = p.columns[q] * width * int(sizeof(T));
    }
    for (int i = thread; i <= rows; i += threads) offsets[i] = p.row_offsets[i];
  }

  // Worker i of slot r; neighbouring slots are blockDim.y rows apart.
  const int64_t group = threadIdx.y;
  const int lane_offset = int(threadIdx.x) * V;
  const int64_t step = int64_t(gridDim.x) * blockDim.z;
  Values<T, kRowScalars<Rule>> scalars[R] = {};  // of this thread's workers, which are the same in every tile
  if constexpr (kRowScalars<Rule> > 0) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = group + r * int64_t(blockDim.y);
      for (int k = 0; i < rows && k < kRowScalars<Rule>; ++k) scalars[r][k] = p.row_scalars[i * kRowScalars<Rule> + k];
    }
  }
  const bool strips = kHasNorm<Rule> && p.lane_sums != nullptr;
  const int64_t span = strips ? p.blocks * kReduceLanes : p.last - p.first;
  Vector<T, V> squares[R] = {};  // of a strip
  int term = 0;                  // which tile of it
  for (int64_t base = int64_t(blockIdx.x) * blockDim.z; base * width < span;) {
    const int64_t lane = (base + threadIdx.z) * width;  // the first one, in [0, span), if there are strips
    const int64_t tile_begin = strips ? lane / kReduceLanes * kReduceBlock + lane % kReduceLanes + term * kReduceLanes
                                      : p.first + (base + threadIdx.z) * (width - kFaultGrid * V);
    const int64_t c = tile_begin + lane_offset;
    const bool inside = c < p.last + kFaultTail;

    S slice[R] = {};  // a slot without a worker computes nothing, but the compiler may move its registers
    const auto load = [&](S& slot, int64_t i) {
      slot.x = load_vector<V>(p.x + i * p.x_stride + c);
      slot.g = load_vector<V>(p.g + i * p.g_stride + c);
      slot.template load_states<Loads::kLoads>(p.state, i * p.state_stride + c);
    };
    if (inside && group + (R - 1) * int64_t(blockDim.y) < rows) {  // the usual case, without a branch between loads
#pragma unroll
      for (int r = 0; r < R; ++r) load(slice[r], group + r * int64_t(blockDim.y));
    } else if (inside) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (group + r * int64_t(blockDim.y) < rows) load(slice[r], group + r * int64_t(blockDim.y));
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = int(group) + r * int(blockDim.y);
      if (inside && i < rows) {
        typename S::Messages message;
        slice[r].local(for_row(p.rule, scalars[r].data, 0), message);
        for (int k = 0; k < kMessages; ++k) store_shared(messages + k * plane + i * width + lane_offset, message[k]);
      }
    }

    if (p.form != MixingForm::kIdentity && !kFaultNoBarrier) __syncthreads();
    T* const mean = messages + kMessages * plane;  // [message, coordinate]
    if (p.form == MixingForm::kMean) {
      const int64_t left = p.last - tile_begin;
      const int filled = left < width ? int(left) : width;
      const int thread = int(threadIdx.y * blockDim.x + threadIdx.x), threads = int(blockDim.x * blockDim.y);
      for (int k = 0; k < kMessages; ++k) {
        for (int at = thread; at < filled; at += threads) {
          const T* const column = messages + k * plane + at;
          T sum = column[0];
#pragma unroll 4
          for (int i = 1; i < rows; ++i) sum = sum + column[i * width];
          mean[k * width + at] = sum * p.scale;
        }
      }
      if (!kFaultNoBarrier) __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = group + r * int64_t(blockDim.y);
      if (inside && i < rows) {
        typename S::Messages mixed;
        if (p.form == MixingForm::kSparse) {
          const int begin = offsets[i], end = offsets[i + 1];
          for (int k = 0; k < kMessages; ++k) {
            const unsigned char* const of_all = reinterpret_cast<unsigned char*>(messages + k * plane + lane_offset);
            const auto message = [&](int q) { return load_vector<V>(reinterpret_cast<const T*>(of_all + columns[q])); };
            mixed[k] = {};  // of a row without entries, which the CPU refuses and a GPU cannot see in time
            if (begin < end) mixed[k] = product(weights[begin], message(begin));
#pragma unroll 2
            for (int q = begin + 1; q < end; ++q) add_product(mixed, k, weights[q], message(q));
          }
        } else {
          const T* const from = p.form == MixingForm::kMean ? mean : messages + int(i) * width;
          const int pitch = p.form == MixingForm::kMean ? width : plane;
          for (int k = 0; k < kMessages; ++k) mixed[k] = load_vector<V>(from + k * pitch + lane_offset);
        }
        slice[r].merge(for_row(p.rule, scalars[r].data, 0), mixed);
        store_global(p.x + i * p.x_stride + c, slice[r].x);
        slice[r].template store_states<Loads::kStores>(p.state, i * p.state_stride + c);
        if constexpr (kHasNorm<Rule>) add_squares(squares[r], slice[r].state[kNormState<Rule>]);
      }
    }
    T* const swap = messages;
    messages = other;
    other = swap;
    if constexpr (kHasNorm<Rule>) {
      if (strips && ++term < kReduceTerms) continue;
      term = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t i = group + r * int64_t(blockDim.y);
        if (strips && lane < span && i < rows) {
          store_global(p.lane_sums + i * span + lane + lane_offset, squares[r]);
        }
        squares[r] = {};
      }
    }
    base += step;
  }
}

template <class Rule, class Storage>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<Rule, Compute<Storage>>)
    gossip_columns(const GossipParameters<Rule, Storage> p) {
  using S = Slice<Rule, Storage, 1>;
  using T = typename S::T;
  constexpr int kMessages = Rule::kMessages;

  T* const messages = reinterpret_cast<T*>(dynamic_shared());  // [message, worker, lane], then [message, lane]
  const int width = int(blockDim.x), lane = int(threadIdx.x), rows = p.rows;
  const int64_t plane = int64_t(rows) * width;
  T* const mean = messages + kMessages * plane;
  const int64_t count = p.last - p.first - p.skipped + kFaultTail;
  for (int64_t begin = int64_t(blockIdx.x) * width; begin < count; begin += int64_t(gridDim.x) * width) {
    const bool inside = begin + lane < count;
    int64_t c = p.first + begin + lane;
    if (c >= p.skip) c += p.skipped;

    if (inside) {
      for (int64_t i = threadIdx.y; i < rows; i += blockDim.y) {
        S slice;
        slice.x = load_vector<1>(p.x + i * p.x_stride + c);
        slice.g = load_vector<1>(p.g + i * p.g_stride + c);
        slice.template load_states<Rule::kLocalReads>(p.state, i * p.state_stride + c);
        typename S::Messages message;
        slice.local(for_row(p.rule, p.row_scalars, i), message);
        slice.template store_states<Rule::kLocalWrites>(p.state, i * p.state_stride + c);
        for (int k = 0; k < kMessages; ++k) messages[k * plane + i * width + lane] = message[k].at[0];
      }
    }
    if (!kFaultNoBarrier) __syncthreads();
    if (p.form == MixingForm::kMean) {
      if (inside && threadIdx.y == 0) {
        for (int k = 0; k < kMessages; ++k) {
          const T* const column = messages + k * plane + lane;
          T sum = column[0];
#pragma unroll 4
          for (int i = 1; i < rows; ++i) sum = sum + column[i * width];
          mean[k * width + lane] = sum * p.scale;
        }
      }
      if (!kFaultNoBarrier) __syncthreads();
    }
    if (inside) {
      for (int64_t i = threadIdx.y; i < rows; i += blockDim.y) {
        typename S::Messages mixed;
        for (int k = 0; k < kMessages; ++k) {
          const T* const of_all = messages + k * plane + lane;
          if (p.form == MixingForm::kSparse) {
            const int begin_q = p.row_offsets[i], end_q = p.row_offsets[i + 1];
            T sum = T(0);
            if (begin_q < end_q) sum = p.weights[begin_q] * of_all[int64_t(p.columns[begin_q]) * width];
#pragma unroll 2
            for (int q = begin_q + 1; q < end_q; ++q) {
              sum = sum + p.weights[q] * of_all[int64_t(p.columns[q]) * width];
            }
            mixed[k].at[0] = sum;
          } else {
            mixed[k].at[0] = p.form == MixingForm::kMean ? mean[k * width + lane] : of_all[i * width];
          }
        }
        S slice;
        if (Rule::kMergeReadsX) slice.x = load_vector<1>(p.x + i * p.x_stride + c);
        if (Rule::kMergeReadsGrad) slice.g = load_vector<1>(p.g + i * p.g_stride + c);
        slice.template load_states<Rule::kMergeReads>(p.state, i * p.state_stride + c);
        slice.merge(for_row(p.rule, p.row_scalars, i), mixed);
        store_global(p.x + i * p.x_stride + c, slice.x);
        slice.template store_states<Rule::kMergeWrites>(p.state, i * p.state_stride + c);
      }
    }
    if (!kFaultNoBarrier) __syncthreads();  // before the tile is filled again
  }
}

// Elements from p to the next address that is a multiple of `count` elements.
template <class T>
int64_t to_alignment(const T* p, int count) {
  const uintptr_t over = reinterpret_cast<uintptr_t>(p) % (count * sizeof(T));
  return over == 0 ? 0 : int64_t(count - over / sizeof(T));
}

// Where the aligned coordinates of all rows begin; -1 if rows are aligned differently.
template <class Rule, class Storage>
int64_t aligned_begin(const GossipParameters<Rule, Storage>& p) {
  constexpr int V = kVector<Compute<Storage>>;
  const int64_t head = to_alignment(p.x, V);
  bool equal = to_alignment(p.g, V) == head;
  for (int k = 0; k < Rule::kStates; ++k) equal = equal && to_alignment(p.state[k], V) == head;
  const bool strides = p.rows == 1 || (p.x_stride % V == 0 && p.g_stride % V == 0 && p.state_stride % V == 0);
  return equal && strides ? head : -1;
}

struct TileShape {
  int lanes, groups, tiles;
  int64_t shared;
};

// The widest rows for which a device holds three blocks at a time (two, one), since a block that waits
// for memory should have others to mix meanwhile. lanes = 0: no tile of all rows fits.
template <class Rule, class T>
TileShape tile_shape(const Device& device, MixingForm form, int64_t rows, int64_t nnz) {
  constexpr int kWanted = 128;  // threads in a block, at least
  const int64_t groups = (rows + kRows<Rule> - 1) / kRows<Rule>;
  for (int blocks = 3; blocks > 0; --blocks) {
    for (const int lanes : {32, 16, 8, 4}) {
      const int64_t threads = groups * lanes;
      if (threads > kMaxThreads) continue;
      const int tiles = int(std::max<int64_t>(1, kWanted / threads));
      const int64_t shared = TileLayout<Rule, T>(form, rows, nnz, lanes * kVector<T>, tiles).total;
      const int64_t available = device.shared_per_multiprocessor / blocks - device.reserved_shared;
      if (shared <= std::min(available, device.shared_per_block)) return {lanes, int(groups), tiles, shared};
    }
  }
  return {0, 0, 0, 0};
}

// Strips for each block that a device runs at once, at least: with fewer, the last ones would leave more of it idle
// than reading a vector once more costs.
constexpr int64_t kStripsEach = 8;

template <class Rule, class Storage>
void gossip_all_columns(const Device& device, const GossipParameters<Rule, Storage>& p, cudaStream_t stream) {
  using T = Compute<Storage>;
  const int64_t count = p.last - p.first - p.skipped;
  if (count == 0) return;
  const auto shared = [&](int64_t width) {
    return Rule::kMessages * (int64_t(p.rows) + 1) * width * int64_t(sizeof(T));
  };
  int lanes = 32;
  // Three blocks a multiprocessor while a row of the tile is a sector or more, then whatever fits.
  while (lanes > 8 && shared(lanes) > device.shared_per_multiprocessor / 3 - device.reserved_shared) lanes /= 2;
  while (lanes > 1 && shared(lanes) > device.shared_per_block) lanes /= 2;
  if (shared(lanes) > device.shared_per_block) {
    throw std::runtime_error("gossip_step_: the messages of one coordinate of all " + std::to_string(p.rows) +
                             " workers must fit the " + std::to_string(device.shared_per_block) +
                             " bytes of shared memory that a block has on this device");
  }
  const int groups = int(std::min<int64_t>(p.rows, 256 / lanes));
  launch("gossip_step_", device, gossip_columns<Rule, Storage>, (count + lanes - 1) / lanes, dim3(lanes, groups, 1),
         shared(lanes), stream, p);
}

template <template <class> class RuleOf, class Storage>
void gossip_step(const GossipStepArguments& a) {
  using T = Compute<Storage>;
  using Rule = RuleOf<T>;
  const Device device("gossip_step_", a.device);
  if (a.rows > INT32_MAX || a.mixing.nnz > INT32_MAX) {
    throw std::runtime_error("gossip_step_: at most 2^31 - 1 workers and mixing weights, got " +
                             std::to_string(a.rows) + " and " + std::to_string(a.mixing.nnz));
  }
  GossipParameters<Rule, Storage> p{static_cast<Storage*>(a.x),
                                    static_cast<const Storage*>(a.g),
                                    {},
                                    a.x_stride,
                                    a.g_stride,
                                    a.state_stride,
                                    int32_t(a.rows),
                                    int32_t(a.mixing.nnz),
                                    a.mixing.form,
                                    a.mixing.row_offsets,
                                    a.mixing.columns,
                                    static_cast<const T*>(a.mixing.weights),
                                    static_cast<const T*>(a.row_scalars),
                                    T(1) / T(a.rows),
                                    Rule(a.hyper),
                                    nullptr,
                                    reduce_blocks(a.cols),
                                    0,
                                    a.cols,
                                    a.cols,
                                    0};
  for (int k = 0; k < Rule::kStates; ++k) p.state[k] = static_cast<T*>(a.state[k]);

  constexpr int V = kVector<T>;
  const int64_t head = aligned_begin(p), vectors = head < 0 ? 0 : std::max<int64_t>(0, (a.cols - head) / V);
  // A worker alone: pieces of its row are stepped like rows, so that a thread has as many loads under way as with them.
  const bool alone = a.rows == 1 && a.mixing.form == MixingForm::kIdentity && kRowScalars<Rule> == 0 && !kHasNorm<Rule>;
  GossipParameters<Rule, Storage> tiles = p;
  int64_t wide = vectors;  // vectors in a row of the tiles
  if (alone) {
    constexpr int kSector = 16 / V;  // of 16 elements, so that pieces begin at a sector in every type
    wide = vectors / kRows<Rule> / kSector * kSector;
    tiles.rows = kRows<Rule>;
    tiles.x_stride = tiles.g_stride = tiles.state_stride = wide * V;
  }
  const TileShape shape = tile_shape<Rule, T>(device, a.mixing.form, tiles.rows, a.mixing.nnz);
  if (wide > 0 && shape.lanes > 0) {
    tiles.first = head;
    tiles.last = head + wide * V;
    int64_t count = (wide + shape.lanes - 1) / shape.lanes;
    const dim3 block(shape.lanes, shape.groups, shape.tiles);
    if constexpr (kHasNorm<Rule>) {
      const int64_t strips = p.blocks * kReduceLanes / (shape.lanes * V);
      const int64_t resident = resident_blocks("gossip_step_", device, gossip_tile<Rule, Storage>, block, shape.shared);
      if (head == 0 && strips / shape.tiles >= kStripsEach * resident * device.multiprocessors) {
        tiles.lane_sums = static_cast<T*>(a.lane_sums);
        count = strips;
      }
    }
    launch("gossip_step_", device, gossip_tile<Rule, Storage>, (count + shape.tiles - 1) / shape.tiles, block,
           shape.shared, a.stream, tiles);
    p.skip = head;
    p.skipped = (alone ? tiles.rows : 1) * wide * V;
  }
  gossip_all_columns(device, p, a.stream);
  if constexpr (kHasNorm<Rule>) {
    const ReduceParameters reduce{a.rows, a.cols, a.state_stride, p.blocks, a.block_sums};
    const int64_t summed = tiles.lane_sums == nullptr ? 0 : tiles.last;
    launch("gossip_step_", device, block_sums_of<T>, a.rows * p.blocks, dim3(kReduceLanes), 0, a.stream,
           static_cast<const T*>(p.state[kNormState<Rule>]), static_cast<const T*>(tiles.lane_sums), summed, reduce);
  }
}

}  // namespace qgm::cuda
