// Launchers of fault_kernels.cuh, and two kernels that only nvcc can compile. Used by
// test_ptx_nvcc.py.
#include "fault_kernels.cuh"

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
  constexpr Kernel kernels[] = {exchange<FAULT>,   scale<FAULT>,     warp_sum<FAULT>,   tile_max<FAULT>,
                                two_phases<FAULT>, count<FAULT>,     shift<FAULT>,      far_element<FAULT>,
                                pairs<FAULT>,      undefined<FAULT>, exponential<FAULT>};
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
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_by_number<false>(number), threads, shared);
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
