// What every op gets from Python, whatever the device: pointers, sizes and numbers. A backend adds
// where to run: threads on a CPU (csrc/cpu), device and stream on a GPU (csrc/cuda).
#pragma once

#include <cstdint>

#include "mixing.h"

namespace qgm {

// Storage types, in the order of the dtype codes of qgm_ext/_native.py.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypes = 4;

constexpr int kMaxStates = 8;
constexpr int kMaxMessages = 4;

struct GossipStepArguments {
  void* x;                  // [rows, cols], storage type
  const void* g;            // [rows, cols], storage type
  void* state[kMaxStates];  // each [rows, cols], compute type
  int64_t rows, cols;
  int64_t x_stride, g_stride, state_stride;  // elements from one row to the next
  Mixing mixing;
  const double* hyper;
  const void* row_scalars;  // [rows, kRowScalars], compute type; null if the rule has none
  double* block_sums;       // [rows, reduce_blocks(cols)]: written; null if the rule has no kNormState
  void* lane_sums;          // [rows, reduce_blocks(cols), kReduceLanes], compute type: room, on a GPU, for block_sums
};

struct LocalStepArguments {
  const void* x;                // [size], storage type
  const void* g;                // [size], storage type
  void* state[kMaxStates];      // each [size], compute type
  void* message[kMaxMessages];  // each [size], compute type: written
  int64_t size;
  const double* hyper;
  const void* row_scalars;  // [kRowScalars], compute type; null if the rule has none
};

struct MergeArguments {
  void* x;                  // [size], storage type
  const void* g;            // [size], storage type
  void* state[kMaxStates];  // each [size], compute type
  // Messages in ascending worker order, the worker's own among them: received[k * terms + q] is
  // message k of the q-th worker, [size], compute type.
  const void* const* received;
  const double* weights;  // [terms]; ignored if mean
  int64_t terms;
  bool mean;  // the complete graph: sum, then one product with 1 / terms
  int64_t size;
  const double* hyper;
  const void* row_scalars;  // [kRowScalars], compute type; null if the rule has none
  double* block_sums;       // [reduce_blocks(size)]: written; null if the rule has no kNormState
};

struct ReduceArguments {
  const void* x;  // [rows, cols], storage type
  int64_t rows, cols, stride;
};

// The order of summation of a reduction, on every device. A row is cut into blocks of kReduceBlock
// coordinates. In a block, lane l of kReduceLanes sums coordinates l, l + kReduceLanes, ... in ascending
// order in the compute type; the lanes are added in halves (128, 64, ..., 1); the blocks are added in
// ascending order in double. A short last block just has fewer terms.
constexpr int64_t kReduceBlock = 4096;
constexpr int64_t kReduceLanes = 256;

constexpr int64_t reduce_blocks(int64_t cols) { return (cols + kReduceBlock - 1) / kReduceBlock; }

}  // namespace qgm
