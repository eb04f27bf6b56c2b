// State of the stand-in runtime, shared by its source files.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "mock_runtime.h"

namespace mock {

struct Function {
  std::string name;  // in the PTX
  size_t static_shared = 0;
  size_t dynamic_opt_in = 0;  // set by cudaFuncSetAttribute
  int registers = 0;          // 0: not known, never a limit
  int max_threads = 0;
};

struct Configuration {  // between <<<...>>> and the call of the stub
  dim3 grid, block;
  size_t shared;
  void* stream;
};

struct State {
  static constexpr int kDevices = 2;

  MockLaunch launch = nullptr;
  bool driver = true;
  int device = 0;
  cudaError_t last = cudaSuccess;    // of the latest failed call, until it is asked for
  cudaError_t sticky = cudaSuccess;  // a kernel failed: the context is lost
  std::vector<Configuration> configurations;
  std::map<std::string, uint64_t> counts;
  std::string forbidden;
  // limits of compute capability 9.0, with few multiprocessors, so that persistent grids stay small
  std::map<cudaDeviceAttr, int> attributes = {
      {cudaDevAttrMultiProcessorCount, 4},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 0x7fffffff},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 * 1024},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 * 1024},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024},
      {cudaDevAttrReservedSharedMemoryPerBlock, 1024},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrL2CacheSize, 50 * 1024 * 1024},
      {cudaDevAttrMaxPersistingL2CacheSize, 0},
      {cudaDevAttrCooperativeLaunch, 0},
      {cudaDevAttrClockRate, 0},
      {cudaDevAttrIntegrated, 0},
  };
};

State& state();
std::map<const void*, Function>& functions();  // by host stub; filled while libraries load, never reset

cudaError_t enter();                    // error that every call must return now, or cudaSuccess
cudaError_t report(cudaError_t error);  // note an error for cudaGetLastError and pass it on
void count(const char* kind, const char* call);
int attribute(cudaDeviceAttr which);

}  // namespace mock
