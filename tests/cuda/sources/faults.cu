// Small kernels for the tests of the proof tools: each once right and once with a typical fault.
//
// FAULT is a template parameter, so one compilation has both. Nothing here is part of the product.
#include <cuda_runtime.h>
#include <stdint.h>

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

// Block-wide maximum of four values a thread keeps. Fault: only the lower half of the tile is filled.
template <bool FAULT>
__global__ void tile_max(float* x, int64_t) {
    extern __shared__ float dynamic_tile[];
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

// Shifts x by one block within pairs of blocks. Fault: in place, so it reads what another block writes.
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

// Fault: a register that nothing has written (C++ would remove it, so it is made in PTX).
template <bool FAULT>
__global__ void undefined(float* x, int64_t) {
    float value = 1.0f;
    if (FAULT) asm volatile("{ .reg .f32 never; mov.f32 %0, never; }" : "=f"(value));
    x[threadIdx.x] = value;
}

// Fault: an instruction whose result the PTX ISA leaves open.
template <bool FAULT>
__global__ void exponential(float* x, int64_t) {
    x[threadIdx.x] = FAULT ? __expf(x[threadIdx.x]) : x[threadIdx.x] + 1.0f;
}

using Kernel = void (*)(float*, int64_t);
template <bool FAULT>
static Kernel kernel_by_number(int number) {
    constexpr Kernel kernels[] = {exchange<FAULT>, scale<FAULT>, warp_sum<FAULT>,    tile_max<FAULT>,
                                  two_phases<FAULT>, count<FAULT>, shift<FAULT>,       far_element<FAULT>,
                                  pairs<FAULT>,    undefined<FAULT>, exponential<FAULT>};
    return kernels[number];
}

extern "C" {

int run_kernel(int number, int fault, float* x, int64_t n, int blocks, int threads, size_t shared, void* stream) {
    const Kernel kernel = fault ? kernel_by_number<true>(number) : kernel_by_number<false>(number);
    kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(x, n);
    return cudaGetLastError();
}

int allow_shared(int number, int bytes) {
    return cudaFuncSetAttribute(kernel_by_number<false>(number), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

int resident_blocks(int number, int threads, size_t shared) {
    int blocks = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_by_number<false>(number),
                                                                           threads, shared);
    return error == cudaSuccess ? blocks : -int(error);
}

int static_shared(int number) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_by_number<false>(number));
    return error == cudaSuccess ? int(attributes.sharedSizeBytes) : -int(error);
}

int multiprocessors() {
    int device = 0, value = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    return error == cudaSuccess ? value : -int(error);
}

int peek_error() { return cudaPeekAtLastError(); }
int take_error() { return cudaGetLastError(); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

void forbidden() {  // what a capturable launcher must not do
    void* scratch = nullptr;
    cudaMalloc(&scratch, 16);
    cudaFree(scratch);
    cudaDeviceSynchronize();
}

}  // extern "C"
