// What the tests see of the stand-in for libcudart: configuration, counters, and the callback that
// runs a launch.
//
// The library that nvcc compiled is linked with mock_runtime.cpp in place of libcudart. Each kernel
// launch then calls the callback, which hands it to the PTX machine (tests/cuda/harness.py). No GPU
// and no driver take part.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

// Runs one launch; `arguments[k]` points to the bytes of parameter k. Non-zero means that the
// kernel failed, which is reported as cudaErrorLaunchFailure by this and every later call, as a
// real device does.
typedef int (*MockLaunch)(const char* kernel, const unsigned grid[3], const unsigned block[3], void** arguments,
                          size_t shared_bytes, void* stream);
void mock_set_launch(MockLaunch launch);

// Back to the state after loading: default device, no errors, counters at zero, no shared-memory
// opt-in.
void mock_reset();

// A machine without a driver: every call fails with cudaErrorInsufficientDriver, as the static
// libcudart does.
void mock_set_driver(int present);

// Value of a cudaDeviceAttr, such as the number of multiprocessors.
void mock_set_attribute(int attribute, int value);

// What the driver would know of a compiled kernel. max_threads: of __launch_bounds__, 0 for none.
void mock_set_function(const char* kernel, size_t static_shared_bytes, int registers, int max_threads);

// How often calls were made, by kind: "launch", "synchronise", "allocate", "copy".
uint64_t mock_count(const char* kind);

// Names of the calls that synchronised or allocated, with a space after each.
const char* mock_forbidden_calls();

}  // extern "C"
