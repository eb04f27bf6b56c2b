// Kernels whose machine code is known in advance. Used by test_sass.py; nothing here is part of the
// product.
#include <stdint.h>

// Two 16-byte loads and one 16-byte store in a loop, one 4-byte load and store in its tail.
extern "C" __global__ void wide(float* x, const float* g, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
#pragma unroll 1
  for (int64_t v = first; v < n / 4; v += stride) {
    float4 a = reinterpret_cast<float4*>(x)[v];
    const float4 b = reinterpret_cast<const float4*>(g)[v];
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
    reinterpret_cast<float4*>(x)[v] = a;
  }
  if (first < n % 4) x[n / 4 * 4 + first] += 1.0f;
}

// 2-byte accesses, no loop.
extern "C" __global__ void narrow(uint16_t* x) { x[threadIdx.x] = uint16_t(x[threadIdx.x] + 1); }

// Too many values for 32 registers.
extern "C" __global__ void __maxnreg__(32) spilling(float* x) {
  float values[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) values[k] = x[threadIdx.x + 1024 * k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 64; ++k) x[threadIdx.x + 1024 * k] = values[63 - k] * values[k];
}

// An array with an index that only the running program knows.
extern "C" __global__ void indexed(float* x, const int* which, int n) {
  float sums[16] = {};
  for (int k = 0; k < n; ++k) sums[which[k] & 15] += x[k];
  x[threadIdx.x] = sums[threadIdx.x & 15];
}

// 1 KB of shared memory, read in a loop within a loop.
extern "C" __global__ void tiled(float* x, int rounds) {
  __shared__ float4 tile[64];
  tile[threadIdx.x] = make_float4(x[threadIdx.x], 0, 0, 0);
  __syncthreads();
  float sum = 0;
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    sum *= 2;
#pragma unroll 1
    for (int k = 0; k < rounds + r; ++k) sum += tile[(k * 7) & 63].y;
  }
  x[threadIdx.x] = sum;
}
