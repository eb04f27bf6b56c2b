// The few names that let the kernels compile with nvcc and, for the proofs of tests/cuda, as plain C++
// under the sanitizers. No kernel and no launch here.
#pragma once

#if defined(QGM_EMULATE_CUDA)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "../platform.h"

namespace qgm::cuda {

// Dynamic shared memory of the block, 16-byte aligned.
#if defined(QGM_EMULATE_CUDA)
inline unsigned char* dynamic_shared() { return cuda_emulation::dynamic_shared<unsigned char>(); }
#elif defined(__CUDACC__)
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char qgm_dynamic_shared[];
  return qgm_dynamic_shared;
}
#endif

// Faults that the tests inject to show that the proofs can fail; no build sets them.
#if defined(QGM_FAULT_NO_BARRIER)
constexpr bool kFaultNoBarrier = true;
#else
constexpr bool kFaultNoBarrier = false;
#endif
#if defined(QGM_FAULT_TAIL)
constexpr int kFaultTail = 1;  // one coordinate too many
#else
constexpr int kFaultTail = 0;
#endif
#if defined(QGM_FAULT_GRID)
constexpr int kFaultGrid = 1;  // neighbouring blocks share a tile
#else
constexpr int kFaultGrid = 0;
#endif

}  // namespace qgm::cuda
