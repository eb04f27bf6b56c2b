// The few macros that let one source serve the C++ compiler, nvcc and the sanitizers.
#pragma once

#if defined(QGM_EMULATE_CUDA)
#include "cuda_emulation.h"  // says what __host__ and the like are
#endif

#if defined(__CUDACC__) || defined(QGM_EMULATE_CUDA)
#define QGM_HD __host__ __device__ __forceinline__
#else
#define QGM_HD inline __attribute__((always_inline))
#endif

// The loops of the CPU drivers touch rows that never overlap (checked in qgm_ext/_ops.py), which the
// compiler cannot know of pointers taken from an array.
#if defined(__clang__)
#define QGM_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define QGM_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif
