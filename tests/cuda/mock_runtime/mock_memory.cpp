// Stand-in for libcudart: memory, streams and events. Device memory is host memory; everything
// happens at once.
//
// A kernel library of this project may call almost none of these: what allocates or synchronises
// cannot be captured in a CUDA graph. They work, so that a test can count the calls and name them,
// rather than fail to link.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "mock_state.h"

using namespace mock;

namespace {

// Counts the call, then performs it.
template <class Action>
cudaError_t counted(const char* kind, const char* call, Action action) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  count(kind, call);
  return report(action());
}

cudaError_t nothing() { return cudaSuccess; }

}  // namespace

extern "C" {

// ----------------------------------------------------------------------------------------------
// allocation
cudaError_t cudaMalloc(void** pointer, size_t size) {
  return counted("allocate", "cudaMalloc", [&] {
    *pointer = std::malloc(size);
    return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
  });
}
cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) {
  return counted("allocate", "cudaMallocAsync", [&] {
    *pointer = std::malloc(size);
    return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
  });
}
cudaError_t cudaMallocHost(void** pointer, size_t size) {
  return counted("allocate", "cudaMallocHost", [&] {
    *pointer = std::malloc(size);
    return *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
  });
}
cudaError_t cudaFree(void* pointer) {
  return counted("allocate", "cudaFree", [&] {
    std::free(pointer);
    return cudaSuccess;
  });
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  return counted("allocate", "cudaFreeAsync", [&] {
    std::free(pointer);
    return cudaSuccess;
  });
}
cudaError_t cudaFreeHost(void* pointer) {
  return counted("allocate", "cudaFreeHost", [&] {
    std::free(pointer);
    return cudaSuccess;
  });
}

// ----------------------------------------------------------------------------------------------
// copies
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return counted("synchronise", "cudaMemcpy", [&] {
    std::memmove(to, from, size);
    return cudaSuccess;
  });
}
cudaError_t cudaMemset(void* to, int value, size_t size) {
  return counted("synchronise", "cudaMemset", [&] {
    std::memset(to, value, size);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return counted("copy", nullptr, [&] {
    std::memmove(to, from, size);
    return cudaSuccess;
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  return counted("copy", nullptr, [&] {
    std::memset(to, value, size);
    return cudaSuccess;
  });
}

// ----------------------------------------------------------------------------------------------
// streams, events
cudaError_t cudaDeviceSynchronize() { return counted("synchronise", "cudaDeviceSynchronize", nothing); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return counted("synchronise", "cudaStreamSynchronize", nothing); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return counted("synchronise", "cudaEventSynchronize", nothing); }
cudaError_t cudaStreamQuery(cudaStream_t) { return counted("synchronise", "cudaStreamQuery", nothing); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return enter();
}

}  // extern "C"
