// Stand-in for libcudart: registration and launch of kernels, errors, device and kernel attributes,
// occupancy.
//
// The functions whose names begin with __cuda are private: the code that nvcc 13.0 generates calls
// them. Another nvcc may call others, so harness.py accepts only versions that were tried. Memory
// and streams are in mock_memory.cpp.
#include "mock_runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "mock_state.h"

namespace mock {

State& state() {
  static State instance;
  return instance;
}

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> instance;
  return instance;
}

cudaError_t report(cudaError_t error) {
  if (state().sticky != cudaSuccess) return state().sticky;
  if (error != cudaSuccess) state().last = error;
  return error;
}

cudaError_t enter() { return state().driver ? state().sticky : cudaErrorInsufficientDriver; }

void count(const char* kind, const char* call) {
  ++state().counts[kind];
  if (call != nullptr) state().forbidden += std::string(call) + " ";
}

int attribute(cudaDeviceAttr which) {
  const auto found = state().attributes.find(which);
  return found == state().attributes.end() ? 0 : found->second;
}

static Function* find(const void* host) {
  const auto found = functions().find(host);
  return found == functions().end() ? nullptr : &found->second;
}

// The checks that a driver makes before a kernel starts.
static cudaError_t check_launch(const Function& function, dim3 grid, dim3 block, size_t shared) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0) {
    return cudaErrorInvalidConfiguration;
  }
  const auto over = [](unsigned value, cudaDeviceAttr limit) {
    return value > static_cast<unsigned>(attribute(limit));
  };
  if (over(grid.x, cudaDevAttrMaxGridDimX) || over(grid.y, cudaDevAttrMaxGridDimY) ||
      over(grid.z, cudaDevAttrMaxGridDimZ) || over(block.x, cudaDevAttrMaxBlockDimX) ||
      over(block.y, cudaDevAttrMaxBlockDimY) || over(block.z, cudaDevAttrMaxBlockDimZ)) {
    return cudaErrorInvalidConfiguration;
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads > static_cast<uint64_t>(attribute(cudaDevAttrMaxThreadsPerBlock))) return cudaErrorInvalidConfiguration;
  if (function.max_threads > 0 && threads > static_cast<uint64_t>(function.max_threads)) return cudaErrorInvalidValue;
  // without an opt-in a block gets 48 KB, static and dynamic together
  const size_t usual = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlock));
  const size_t allowed = std::max(usual, function.static_shared + function.dynamic_opt_in);
  if (function.static_shared + shared > allowed) return cudaErrorInvalidValue;
  const uint64_t registers = threads * static_cast<uint64_t>(function.registers);
  if (registers > static_cast<uint64_t>(attribute(cudaDevAttrMaxRegistersPerBlock))) {
    return cudaErrorLaunchOutOfResources;
  }
  return cudaSuccess;
}

static cudaError_t launch(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  const Function* function = find(host);
  if (function == nullptr) return report(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t error = check_launch(*function, grid, block, shared); error != cudaSuccess) {
    return report(error);
  }
  count("launch", nullptr);
  const unsigned grid_size[3] = {grid.x, grid.y, grid.z};
  const unsigned block_size[3] = {block.x, block.y, block.z};
  if (state().launch == nullptr ||
      state().launch(function->name.c_str(), grid_size, block_size, arguments, shared, stream) != 0) {
    state().sticky = cudaErrorLaunchFailure;
  }
  return state().sticky;
}

}  // namespace mock

using namespace mock;

// ----------------------------------------------------------------------------------------------
// for the tests
extern "C" {

void mock_set_launch(MockLaunch launch) { state().launch = launch; }

void mock_reset() {
  const MockLaunch launch = state().launch;
  state() = State();
  state().launch = launch;
  for (auto& entry : functions()) entry.second.dynamic_opt_in = 0;
}

void mock_set_driver(int present) { state().driver = present != 0; }

void mock_set_attribute(int which, int value) { state().attributes[static_cast<cudaDeviceAttr>(which)] = value; }

void mock_set_function(const char* kernel, size_t static_shared_bytes, int registers, int max_threads) {
  for (auto& entry : functions()) {
    if (entry.second.name != kernel) continue;
    entry.second.static_shared = static_shared_bytes;
    entry.second.registers = registers;
    entry.second.max_threads = max_threads;
  }
}

uint64_t mock_count(const char* kind) { return state().counts[kind]; }

const char* mock_forbidden_calls() { return state().forbidden.c_str(); }

// ----------------------------------------------------------------------------------------------
// private, for nvcc
void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  handle = binary;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  functions()[host].name = device;
}
// Variables live in the PTX machine; copying to them from the host is not supported, so nothing is
// kept.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  state().configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration top = state().configurations.back();
  state().configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<void**>(stream) = top.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;  // an unknown function is reported by the launch
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

// ----------------------------------------------------------------------------------------------
// launches, errors
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(host, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  // clusters and dependent launches are not modelled
  if (config->numAttrs != 0) return report(cudaErrorNotSupported);
  return launch(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaPeekAtLastError() {
  const cudaError_t state_error = enter();
  return state_error != cudaSuccess ? state_error : state().last;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  state().last = cudaSuccess;
  return error;
}

static const std::map<cudaError_t, std::pair<const char*, const char*>>& error_names() {
  static const std::map<cudaError_t, std::pair<const char*, const char*>> names = {
      {cudaSuccess, {"cudaSuccess", "no error"}},
      {cudaErrorInvalidValue, {"cudaErrorInvalidValue", "invalid argument"}},
      {cudaErrorInvalidConfiguration, {"cudaErrorInvalidConfiguration", "invalid configuration argument"}},
      {cudaErrorInsufficientDriver,
       {"cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"}},
      {cudaErrorInvalidDeviceFunction, {"cudaErrorInvalidDeviceFunction", "invalid device function"}},
      {cudaErrorInvalidDevice, {"cudaErrorInvalidDevice", "invalid device ordinal"}},
      {cudaErrorLaunchOutOfResources, {"cudaErrorLaunchOutOfResources", "too many resources requested for launch"}},
      {cudaErrorLaunchFailure, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
      {cudaErrorNotSupported, {"cudaErrorNotSupported", "operation not supported"}},
  };
  return names;
}
const char* cudaGetErrorName(cudaError_t error) {
  const auto found = error_names().find(error);
  return found == error_names().end() ? "unrecognized error code" : found->second.first;
}
const char* cudaGetErrorString(cudaError_t error) {
  const auto found = error_names().find(error);
  return found == error_names().end() ? "unrecognized error code" : found->second.second;
}

// ----------------------------------------------------------------------------------------------
// device
cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  *device = state().device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  if (device < 0 || device >= State::kDevices) return report(cudaErrorInvalidDevice);
  state().device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  if (const cudaError_t error = enter(); error != cudaSuccess) {
    *count = 0;
    return report(error);
  }
  *count = State::kDevices;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  if (device < 0 || device >= State::kDevices) return report(cudaErrorInvalidDevice);
  if (state().attributes.count(which) == 0) return report(cudaErrorInvalidValue);
  *value = attribute(which);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  if (device < 0 || device >= State::kDevices) return report(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof *properties);
  std::strcpy(properties->name, "PTX machine");
  properties->major = attribute(cudaDevAttrComputeCapabilityMajor);
  properties->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  properties->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  properties->warpSize = attribute(cudaDevAttrWarpSize);
  properties->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  properties->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->sharedMemPerBlock = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlock));
  properties->sharedMemPerBlockOptin = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  properties->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
  properties->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  properties->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = state().driver ? CUDART_VERSION : 0;
  return cudaSuccess;
}

// ----------------------------------------------------------------------------------------------
// kernel attributes
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute which, int value) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  Function* function = find(host);
  if (function == nullptr) return report(cudaErrorInvalidDeviceFunction);
  if (which == cudaFuncAttributePreferredSharedMemoryCarveout) {
    return report(value < -1 || value > 100 ? cudaErrorInvalidValue : cudaSuccess);
  }
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return report(cudaErrorNotSupported);
  const size_t limit = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (value < 0 || function->static_shared + static_cast<size_t>(value) > limit) return report(cudaErrorInvalidValue);
  function->dynamic_opt_in = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  const Function* function = find(host);
  if (function == nullptr) return report(cudaErrorInvalidDeviceFunction);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = function->static_shared;
  attributes->numRegs = function->registers;
  attributes->maxThreadsPerBlock =
      function->max_threads > 0 ? function->max_threads : attribute(cudaDevAttrMaxThreadsPerBlock);
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(
      std::max(function->dynamic_opt_in,
               static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlock)) - function->static_shared));
  attributes->ptxVersion = attributes->binaryVersion =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t dynamic_shared, unsigned) {
  if (const cudaError_t error = enter(); error != cudaSuccess) return report(error);
  const Function* function = find(host);
  if (function == nullptr) return report(cudaErrorInvalidDeviceFunction);
  if (threads <= 0) return report(cudaErrorInvalidValue);
  const int warps = (threads + 31) / 32;
  int result = std::min(attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / (32 * warps),
                        attribute(cudaDevAttrMaxBlocksPerMultiprocessor));
  const size_t shared = function->static_shared + dynamic_shared +
                        static_cast<size_t>(attribute(cudaDevAttrReservedSharedMemoryPerBlock));
  if (shared > 0) {
    const size_t all = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
    result = std::min(result, static_cast<int>(all / shared));
  }
  if (function->registers > 0) {
    // registers are handed out to a warp in units of 256
    const int per_warp = (32 * function->registers + 255) / 256 * 256;
    result = std::min(result, attribute(cudaDevAttrMaxRegistersPerMultiprocessor) / (per_warp * warps));
  }
  *blocks = result;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads,
                                                          size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, dynamic_shared, 0);
}

}  // extern "C"
