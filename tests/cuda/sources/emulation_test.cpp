// Runs a kernel of fault_kernels.cuh on the host: `emulation_test KERNEL FAULT SEED`. See
// test_emulation.py.
//
// Right kernels must compute the right result; with a fault, a sanitizer or the emulation must stop
// the program.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fault_kernels.cuh"

using cuda_emulation::Buffer;
using cuda_emulation::launch;

static void check(bool condition, const char* what) {
  if (condition) return;
  std::printf("wrong result: %s\n", what);
  std::exit(2);
}

template <bool FAULT>
static void run(const char* name, unsigned seed) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const cuda_emulation::Options options{.seed = seed};
  const cuda_emulation::Options unordered{.seed = seed, .unordered_blocks = true};
  if (is("exchange")) {
    Buffer<float> x(300);
    for (int i = 0; i < 300; ++i) x[i] = float(i);
    launch(2, 256, 0, [&] { exchange<FAULT>(x.data(), 300); }, options);
    for (int i = 0; i < 300; ++i) check(x[i] == float(i ^ 1), "exchange");
  } else if (is("scale")) {
    Buffer<float> x(1003);
    for (int i = 0; i < 1003; ++i) x[i] = float(i);
    launch(3, 32, 0, [&] { scale<FAULT>(x.data(), 1003); }, unordered);
    for (int i = 0; i < 1003; ++i) check(x[i] == float(2 * i), "scale");
  } else if (is("warp_sum")) {
    Buffer<float> x(64);
    for (int i = 0; i < 64; ++i) x[i] = float(i);
    launch(1, 64, 0, [&] { warp_sum<FAULT>(x.data(), 64); }, options);
    check(x[0] == 120.0f && x[32] == 632.0f, "warp_sum");
  } else if (is("tile_max")) {
    Buffer<float> x(64);
    for (int i = 0; i < 64; ++i) x[i] = float(i * 7 % 64);
    // the fault here is a launch with one float too few
    launch(1, 64, FAULT ? 252 : 256, [&] { tile_max<false>(x.data(), 64); }, options);
    for (int i = 0; i < 64; ++i) check(x[i] == 63.0f, "tile_max");
  } else if (is("two_phases")) {
    Buffer<float> x(64);
    launch(1, 64, 0, [&] { two_phases<FAULT>(x.data(), 64); }, options);
    for (int i = 0; i < 64; ++i) check(x[i] == 2.0f, "two_phases");
  } else if (is("count")) {
    Buffer<float> x(64);
    launch(2, 32, 0, [&] { count<FAULT>(x.data(), 64); }, unordered);
    check(x[0] == 1.0f, "count");
  } else if (is("shift")) {
    Buffer<float> x(128);
    launch(2, 32, 0, [&] { shift<FAULT>(x.data(), 128); }, unordered);
  } else if (is("pairs")) {
    Buffer<float> x(130);
    launch(1, 64, 0, [&] { pairs<FAULT>(x.data(), 130); }, options);
  } else {
    std::printf("no kernel %s\n", name);
    std::exit(3);
  }
}

// The 16-bit conversions against a slower definition: every value of 16 bits, and the midpoints
// between neighbours.
static void check_conversions() {
  for (unsigned bits = 0; bits < 0x7c00; ++bits) {
    const float value = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    const float next =
        bits + 1 < 0x7c00 ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits + 1))) : 65536.0f;
    const unsigned even = bits % 2 == 0 ? bits : bits + 1;
    check(__half_as_ushort(__float2half_rn(value)) == bits, "half round trip");
    check(__half_as_ushort(__float2half_rn(-value)) == (bits | 0x8000u), "negative half");
    const float middle = (value + next) / 2;
    check(__half_as_ushort(__float2half_rn(middle)) == even, "half tie");
    check(__half_as_ushort(__float2half_rn(std::nextafter(middle, 0.0f))) == bits, "below a half tie");
    check(__half_as_ushort(__float2half_rn(std::nextafter(middle, 1e9f))) == bits + 1, "above a half tie");
  }
  for (unsigned bits = 0; bits < 0x7f80; ++bits) {
    const float value = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
    const float middle = __uint_as_float(__float_as_uint(value) | 0x8000u);
    check(__bfloat16_as_ushort(__float2bfloat16_rn(value)) == bits, "bfloat16 round trip");
    check(__bfloat16_as_ushort(__float2bfloat16_rn(middle)) == (bits % 2 == 0 ? bits : bits + 1), "bfloat16 tie");
  }
  check(__bfloat16_as_ushort(__float2bfloat16_rn(NAN)) == 0x7fff, "bfloat16 NaN");
  check(__half_as_ushort(__float2half_rn(NAN)) == 0x7fff, "half NaN");
  check(__half_as_ushort(__float2half_rn(INFINITY)) == 0x7c00, "half infinity");
}

// Warp operations against their definition.
static void check_warp_operations() {
  Buffer<int> out(5 * 64);
  launch(1, dim3(32, 2), 0,
         [&] {
           const int i = int(threadIdx.y * 32 + threadIdx.x), lane = int(threadIdx.x);
           out[i] = __shfl_down_sync(~0u, i, 3, 8);
           out[64 + i] = __shfl_up_sync(~0u, i, 3, 8);
           out[128 + i] = __shfl_xor_sync(~0u, i, 5);
           out[192 + i] = __shfl_sync(~0u, i, 2, 16);
           out[256 + i] = int(__ballot_sync(~0u, lane % 3 == 0)) ^ (__any_sync(~0u, i == 40) << 31);
         },
         {.seed = 7});
  unsigned thirds = 0;
  for (int k = 0; k < 32; k += 3) thirds |= 1u << k;
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 8;
    check(out[i] == (lane + 3 < 8 ? i + 3 : i), "shuffle down");
    check(out[64 + i] == (lane >= 3 ? i - 3 : i), "shuffle up");
    check(out[128 + i] == (i ^ 5), "shuffle xor");
    check(out[192 + i] == i / 16 * 16 + 2, "shuffle");
    check(unsigned(out[256 + i]) == (thirds ^ (i >= 32 ? 0x80000000u : 0u)), "ballot");
  }
}

int main(int, char** arguments) {
  const char* name = arguments[1];
  const bool fault = std::atoi(arguments[2]) != 0;
  const unsigned seed = static_cast<unsigned>(std::atoi(arguments[3]));
  if (std::strcmp(name, "conversions") == 0) {
    check_conversions();
  } else if (std::strcmp(name, "warps") == 0) {
    check_warp_operations();
  } else if (fault) {
    run<true>(name, seed);
  } else {
    run<false>(name, seed);
  }
  std::puts("right");
}
