// Launching a kernel: on the caller's device and stream, a persistent grid sized from the device, errors
// with the op's name. Nothing here allocates or waits, so a CUDA graph can capture it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "device.h"

namespace qgm::cuda {

#if defined(QGM_EMULATE_CUDA)

// What a small GPU allows, and the thread order that a test asks for.
struct Device {
  Device(const char*, int) {}
  int64_t multiprocessors = 2, shared_per_block = 96 << 10, shared_per_multiprocessor = 96 << 10;
  int64_t reserved_shared = 1 << 10;
};

inline cuda_emulation::Options& emulation_options() {
  static cuda_emulation::Options options;
  return options;
}

template <class Kernel, class... Arguments>
void launch_blocks(const char*, Kernel kernel, int64_t blocks, dim3 block, int64_t shared, cudaStream_t,
                   const Arguments&... arguments) {
  cuda_emulation::launch(
      dim3(unsigned(blocks)), block, size_t(shared), [&] { kernel(arguments...); }, emulation_options());
}

template <class Kernel>
int64_t resident_blocks(const char*, const Device&, Kernel, dim3, int64_t) {
  return 1;
}

#else

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string message = std::string(op) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorInsufficientDriver) {
    message += "; there is no NVIDIA driver here, or it is older than the CUDA runtime that qgm_ext was built with";
  } else if (error == cudaErrorNoDevice) {
    message += "; there is a driver but no GPU, or CUDA_VISIBLE_DEVICES hides it";
  } else if (error == cudaErrorNoKernelImageForDevice) {
    message += "; qgm_ext was built for other GPUs: build it with QGM_CUDA_ARCHS set to this one";
  }
  throw std::runtime_error(message);
}

// Makes a device the current one of this thread while it lives, and knows its limits.
class Device {
 public:
  Device(const char* op, int device) {
    check(op, cudaGetDevice(&previous_));
    current_ = previous_;
    if (device != previous_) {
      check(op, cudaSetDevice(device));
      current_ = device;
    }
    multiprocessors = attribute(op, cudaDevAttrMultiProcessorCount);
    shared_per_block = attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    shared_per_multiprocessor = attribute(op, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    reserved_shared = attribute(op, cudaDevAttrReservedSharedMemoryPerBlock);
  }
  ~Device() {
    if (current_ != previous_) cudaSetDevice(previous_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int64_t multiprocessors, shared_per_block, shared_per_multiprocessor, reserved_shared;

 private:
  int64_t attribute(const char* op, cudaDeviceAttr which) const {
    int value = 0;
    check(op, cudaDeviceGetAttribute(&value, which, current_));
    return value;
  }

  int previous_ = 0, current_ = 0;
};

// Starts so many blocks.
template <class Kernel, class... Arguments>
void launch_blocks(const char* op, Kernel kernel, int64_t blocks, dim3 block, int64_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  // clang-format off
  kernel<<<unsigned(blocks), block, size_t(shared), stream>>>(arguments...);
  // clang-format on
  check(op, cudaGetLastError());
}

// How many such blocks a multiprocessor runs at once; lets the kernel have the shared memory.
template <class Kernel>
int64_t resident_blocks(const char* op, const Device&, Kernel kernel, dim3 block, int64_t shared) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  constexpr int64_t kWithoutOptIn = 48 << 10;
  if (shared > kWithoutOptIn) {
    check(op, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  }
  int resident = 0;
  check(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, int(block.x * block.y * block.z),
                                                          size_t(shared)));
  return std::max(1, resident);
}

#endif

// Starts as many blocks as the device runs at once, at most one for each piece of work; the kernel strides
// over the rest.
template <class Kernel, class... Arguments>
void launch(const char* op, const Device& device, Kernel kernel, int64_t work, dim3 block, int64_t shared,
            cudaStream_t stream, const Arguments&... arguments) {
  const int64_t resident = resident_blocks(op, device, kernel, block, shared);
  launch_blocks(op, kernel, std::min(work, resident * device.multiprocessors), block, shared, stream, arguments...);
}

}  // namespace qgm::cuda
