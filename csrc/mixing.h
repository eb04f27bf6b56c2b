// The mixing matrix W as the kernels see it.
//
// A worker's neighbours are summed in ascending worker order, its own message at its own place, so
// every driver adds the same numbers in the same order. Weights are in the compute type.
#pragma once

#include <cstdint>

namespace qgm {

enum class MixingForm : int {
  kIdentity = 0,  // W = I: nothing is exchanged
  kMean = 1,      // W = 11^T / n: one sum for all workers, then one product with 1/n
  kSparse = 2,    // compressed sparse rows, also for a matrix without zeros
};

struct Mixing {
  MixingForm form;
  const int32_t* row_offsets;  // [n + 1], unused by the other two forms
  const int32_t* columns;      // [nnz], ascending within a row
  const void* weights;         // [nnz], float or double
  int64_t nnz;                 // stored entries
};

}  // namespace qgm
