// Reductions on a GPU with the bits of csrc/cpu/reduce.h: the order of ../arguments.h, no atomics.
//
// One thread block sums one block of coordinates and leaves a double in the caller's scratch memory; a
// second kernel adds those in ascending order. Loads are one coordinate a thread, whole sectors of a warp;
// kReduceBlock / kReduceLanes of them are in flight at once, which is plenty. consensus_distance reads x twice, the
// second time from L1 or L2.
#pragma once

#include "arguments.h"

namespace qgm::cuda {

void squared_norms(DType dtype, const ReduceArguments& a, double* out);
void consensus_distance(DType dtype, const ReduceArguments& a, double* out);
void rows_are_finite(DType dtype, const ReduceArguments& a, bool* out);
// out[i] = sum_b sums[i, b], the end of squared_norms.
void sum_blocks(double* sums, int64_t rows, int64_t blocks, double* out, int device, cudaStream_t stream);

}  // namespace qgm::cuda
