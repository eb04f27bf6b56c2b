// Small kernels for the tests of the proof tools: each once right and once with a typical fault.
//
// FAULT is a template parameter, so one compilation has both. Compiled by nvcc (faults.cu) and, on
// the host, by g++ (emulation_test.cpp). Nothing here is part of the product.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#if defined(QGM_EMULATE_CUDA)
#define DYNAMIC_SHARED(type, name) type* name = cuda_emulation::dynamic_shared<type>()
#else
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

// Loads a neighbour's value through shared memory. Fault: no barrier between store and load.
template <bool FAULT>
__global__ void exchange(float* x, int64_t n) {
  __shared__ float tile[256];
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0.0f;
  if (!FAULT) __syncthreads();
  if (i < n) x[i] = tile[threadIdx.x ^ 1];
}

// Doubles x with 16-byte accesses and a scalar tail. Fault: the tail goes one element too far.
template <bool FAULT>
__global__ void scale(float* x, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t v = i; v < n / 4; v += stride) {
    float4 a = reinterpret_cast<const float4*>(x)[v];
    a.x *= 2.0f, a.y *= 2.0f, a.z *= 2.0f, a.w *= 2.0f;
    reinterpret_cast<float4*>(x)[v] = a;
  }
  for (int64_t k = n / 4 * 4 + i; FAULT ? k <= n : k < n; k += stride) x[k] *= 2.0f;
}

// Sums a warp. Fault: half of the warp has left, but the mask names all of it.
template <bool FAULT>
__global__ void warp_sum(float* x, int64_t) {
  if (FAULT && threadIdx.x % 32 >= 16) return;
  float sum = x[threadIdx.x];
  for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset, 16);
  if (threadIdx.x % 32 == 0) x[threadIdx.x] = sum;
}

// Block-wide maximum of four values a thread keeps. Fault: only the lower half of the tile is
// filled.
template <bool FAULT>
__global__ void tile_max(float* x, int64_t) {
  DYNAMIC_SHARED(float, dynamic_tile);
  if (!FAULT || threadIdx.x < blockDim.x / 2) dynamic_tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float best = dynamic_tile[0];
  for (unsigned k = 1; k < blockDim.x; ++k) best = fmaxf(best, dynamic_tile[k]);
  x[threadIdx.x] = best;
}

// Fault: threads of the first warp take another barrier, or none.
template <bool FAULT>
__global__ void two_phases(float* x, int64_t) {
  if (FAULT && threadIdx.x < 32) return;
  x[threadIdx.x] += 1.0f;
  __syncthreads();
  x[threadIdx.x] *= 2.0f;
}

// Counts into one slot a thread. Fault: all threads of a block share one.
template <bool FAULT>
__global__ void count(float* x, int64_t) {
  x[FAULT ? blockIdx.x : blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
}

// Shifts x by one block within pairs of blocks. Fault: in place, so it reads what another block
// writes.
template <bool FAULT>
__global__ void shift(float* x, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const float value = x[i];
  x[(FAULT ? (i + blockDim.x) % (int64_t{gridDim.x} * blockDim.x) : i) + (FAULT ? 0 : n / 2)] = value;
}

// Element `row * stride` of x. Fault: the product is computed in 32 bits.
template <bool FAULT>
__global__ void far_element(float* x, int64_t stride) {
  const int row = int(blockIdx.x);
  const int64_t i = FAULT ? int64_t{row * int(stride)} : row * stride;
  x[i] = 1.0f;
}

// Reads two elements at once. Fault: from an odd element on.
template <bool FAULT>
__global__ void pairs(float* x, int64_t) {
  float2* p = reinterpret_cast<float2*>(x + (FAULT ? 1 : 0)) + threadIdx.x;
  *p = make_float2(p->y, p->x);
}
