// Runs the threads of a CUDA block as fibers of one OS thread, so that sanitizers see them as
// threads.
//
// A fiber runs until it comes to a barrier or a warp operation; the scheduler then takes the next
// one, in an order that the seed shuffles. AddressSanitizer is told of every change of stack.
// ThreadSanitizer treats each fiber as a thread of its own: a barrier orders the fibers of a block,
// a shuffle orders nothing, and so a missing __syncthreads is a data race that it reports with both
// lines. Faults of the emulation itself (a divergent barrier, a wrong mask) abort.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_emulation {

// The scheduler's own data is invisible to ThreadSanitizer: only the kernel's accesses are
// examined.
#define CUDA_EMULATION_INTERNAL __attribute__((no_sanitize_thread, noinline))

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Options {
  unsigned seed = 0;  // order in which threads run: 0 ascending, 1 descending, else shuffled at every barrier
  // Let ThreadSanitizer see blocks as unordered, as they are. Only for kernels without static
  // __shared__ variables, which the blocks share here.
  bool unordered_blocks = false;
};

enum class Status { kReady, kAtBarrier, kAtWarpOperation, kDone };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  dim3 thread;
  unsigned linear = 0;
  Status status = Status::kReady;
  uint32_t mask = 0;  // of the warp operation it waits in
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  char* shared = nullptr;
  uint64_t exchange[1024 / kWarp][kWarp];  // values of the warp operation under way
  char barrier_key = 0, warp_key[1024 / kWarp] = {};
};

struct Scheduler {
  dim3 grid, block_size;
  size_t shared_bytes = 0;
  Block* block = nullptr;
  Fiber* current = nullptr;
  ucontext_t main;
  std::function<void()> body;
  char begin_key = 0, end_key = 0;  // the host before a block, the threads at its end
#if defined(__SANITIZE_THREAD__)
  void* main_tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
#endif
};

CUDA_EMULATION_INTERNAL inline Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

[[noreturn]] inline void fail(const char* what) {
  const Scheduler& s = scheduler();
  const dim3 b = s.block ? s.block->index : dim3(0, 0, 0);
  const dim3 t = s.current ? s.current->thread : dim3(0, 0, 0);
  std::fprintf(stderr, "cuda_emulation: %s: block (%u, %u, %u), thread (%u, %u, %u)\n", what, b.x, b.y, b.z, t.x, t.y,
               t.z);
  std::abort();
}

// What one thread did before release(key) happens before what another does after acquire(key).
inline void release([[maybe_unused]] char* key) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(key);
#endif
}
inline void acquire([[maybe_unused]] char* key) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(key);
#endif
}

// ---------------------------------------------------------------------------------------- changing
// fibers
CUDA_EMULATION_INTERNAL inline void switch_to_main([[maybe_unused]] bool for_good) {
  Scheduler& s = scheduler();
  Fiber* self = s.current;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(s.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, s.main_stack, s.main_stack_bytes);
#endif
  swapcontext(&self->context, &s.main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &s.main_stack, &s.main_stack_bytes);
#endif
}

CUDA_EMULATION_INTERNAL inline void switch_to_fiber(Fiber& fiber) {
  Scheduler& s = scheduler();
  s.current = &fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&s.main, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  s.current = nullptr;
}

CUDA_EMULATION_INTERNAL inline void fiber_entry() {
  Scheduler& s = scheduler();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.main_stack, &s.main_stack_bytes);
#endif
  acquire(&s.begin_key);
  s.body();
  release(&s.end_key);
  s.current->status = Status::kDone;
  switch_to_main(true);
}

// ---------------------------------------------------------------------------------------- called
// by kernels
CUDA_EMULATION_INTERNAL inline Fiber& self() { return *scheduler().current; }
CUDA_EMULATION_INTERNAL inline dim3 thread_index() { return self().thread; }
CUDA_EMULATION_INTERNAL inline dim3 block_index() { return scheduler().block->index; }
CUDA_EMULATION_INTERNAL inline dim3 block_size() { return scheduler().block_size; }
CUDA_EMULATION_INTERNAL inline dim3 grid_size() { return scheduler().grid; }

// Dynamic shared memory of the block, exactly as large as the launch asked for.
template <class T = void>
CUDA_EMULATION_INTERNAL T* dynamic_shared() {
  return static_cast<T*>(static_cast<void*>(scheduler().block->shared));
}

CUDA_EMULATION_INTERNAL inline void sync_threads() {
  char* key = &scheduler().block->barrier_key;
  release(key);
  self().status = Status::kAtBarrier;
  switch_to_main(false);
  acquire(key);
}

// Waits until every lane of the mask is here. Orders no memory by itself.
CUDA_EMULATION_INTERNAL inline void meet_warp(uint32_t mask) {
  if ((mask >> (self().linear % kWarp) & 1) == 0) fail("warp operation by a lane outside its own mask");
  self().mask = mask;
  self().status = Status::kAtWarpOperation;
  switch_to_main(false);
}

CUDA_EMULATION_INTERNAL inline void sync_warp(uint32_t mask) {
  char* key = &scheduler().block->warp_key[self().linear / kWarp];
  release(key);
  meet_warp(mask);
  acquire(key);
}

// The value that lane `source` of the warp passes to this very operation; own value where it is out
// of range.
template <class T>
CUDA_EMULATION_INTERNAL T exchange(uint32_t mask, T value, int source, bool in_range) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
  uint64_t* table = scheduler().block->exchange[self().linear / kWarp];
  std::memcpy(&table[self().linear % kWarp], &value, sizeof value);
  meet_warp(mask);
  if (in_range) {
    if ((mask >> source & 1) == 0) fail("shuffle reads a lane outside the mask");
    std::memcpy(&value, &table[source], sizeof value);
  }
  meet_warp(mask);  // nobody may overwrite the table before all have read
  return value;
}

// ----------------------------------------------------------------------------------------
// scheduling
CUDA_EMULATION_INTERNAL inline bool release_warps(Block& block) {
  bool any = false;
  const unsigned count = static_cast<unsigned>(block.fibers.size());
  for (unsigned first = 0; first < count; first += kWarp) {
    const unsigned lanes = count - first < kWarp ? count - first : kWarp;
    uint32_t waiting = 0, gone = 0, named = 0;
    for (unsigned k = 0; k < lanes; ++k) {
      const Fiber& fiber = block.fibers[first + k];
      if (fiber.status == Status::kAtWarpOperation) waiting |= 1u << k, named |= fiber.mask;
      if (fiber.status == Status::kDone) gone |= 1u << k;
    }
    if (lanes < kWarp) gone |= ~0u << lanes;
    if (waiting == 0) continue;
    if (named & gone) fail("warp operation names lanes that have exited or do not exist");
    if (named != waiting) continue;
    for (unsigned k = 0; k < lanes; ++k) {
      if (waiting >> k & 1) block.fibers[first + k].status = Status::kReady;
    }
    any = true;
  }
  return any;
}

CUDA_EMULATION_INTERNAL inline void run_block(Block& block, std::mt19937& random, unsigned seed) {
  const size_t count = block.fibers.size();
  std::vector<size_t> order(count);
  for (size_t k = 0; k < count; ++k) order[k] = seed == 1 ? count - 1 - k : k;
  for (;;) {
    if (seed > 1) {
      for (size_t k = count; k > 1; --k) std::swap(order[k - 1], order[random() % k]);
    }
    bool ran = false;
    for (const size_t k : order) {
      if (block.fibers[k].status != Status::kReady) continue;
      switch_to_fiber(block.fibers[k]);
      ran = true;
    }
    if (release_warps(block)) continue;
    size_t waiting = 0, done = 0;
    for (const Fiber& fiber : block.fibers) {
      waiting += fiber.status == Status::kAtBarrier;
      done += fiber.status == Status::kDone;
    }
    if (done == count) return;
    if (waiting > 0 && waiting + done == count) {
      if (done > 0) fail("barrier that not all threads of the block reach");
      for (Fiber& fiber : block.fibers) fiber.status = Status::kReady;
    } else if (!ran) {
      fail("threads wait for each other at different barriers or warp operations");
    }
  }
}

// A block's threads with stacks of their own: a stack that two unordered fibers used would look
// like a race.
CUDA_EMULATION_INTERNAL inline void prepare_block(Block& block, dim3 size, size_t shared_bytes) {
  block.fibers.resize(size_t{size.x} * size.y * size.z);
  for (unsigned k = 0; k < block.fibers.size(); ++k) {
    Fiber& fiber = block.fibers[k];
    fiber.linear = k;
    fiber.thread = dim3(k % size.x, k / size.x % size.y, k / (size.x * size.y));
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (fiber.stack == MAP_FAILED) fail("no memory for stacks");
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_entry, 0);
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
  const size_t padded = (shared_bytes + 127) / 128 * 128 + 128;
  block.shared = static_cast<char*>(std::aligned_alloc(128, padded));
  std::memset(block.shared, 0xff, padded);  // a NaN wherever the kernel forgets to write
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared + shared_bytes, padded - shared_bytes);
#endif
}

CUDA_EMULATION_INTERNAL inline void discard_block(Block& block, [[maybe_unused]] size_t shared_bytes) {
  for (Fiber& fiber : block.fibers) {
    munmap(fiber.stack, kStackBytes);
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(fiber.tsan);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared + shared_bytes, 128);
#endif
  std::free(block.shared);
}

// Runs `body`, which calls the kernel, once for every thread of the grid.
template <class Body>
CUDA_EMULATION_INTERNAL void launch(dim3 grid, dim3 block, size_t shared_bytes, Body body, Options options = {}) {
  Scheduler& s = scheduler();
  s.grid = grid;
  s.block_size = block;
  s.shared_bytes = shared_bytes;
  s.body = body;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0) fail("launch configuration");
#if defined(__SANITIZE_THREAD__)
  s.main_tsan = __tsan_get_current_fiber();
#endif
  std::mt19937 random(options.seed);
  std::vector<std::unique_ptr<Block>> blocks;
  const size_t count = size_t{grid.x} * grid.y * grid.z;
  for (size_t k = 0; k < count; ++k) {
    blocks.push_back(std::make_unique<Block>());
    Block& one = *blocks.back();
    one.index = dim3(static_cast<unsigned>(k % grid.x), static_cast<unsigned>(k / grid.x % grid.y),
                     static_cast<unsigned>(k / (size_t{grid.x} * grid.y)));
    prepare_block(one, block, shared_bytes);
    s.block = &one;
    release(&s.begin_key);
    run_block(one, random, options.seed);
    if (!options.unordered_blocks) {
      acquire(&s.end_key);  // the next block's fibers then begin after this block's end
      discard_block(one, shared_bytes);
      blocks.clear();
    }
  }
  acquire(&s.end_key);
  for (auto& one : blocks) discard_block(*one, shared_bytes);
  s.block = nullptr;
}

// An array with exact bounds: the byte before and the byte after it are out of bounds for
// AddressSanitizer, also when it begins at an odd place. `misalign` elements of padding come before
// it, from a 128-byte boundary on.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, size_t misalign = 0) : count_(count) {
    bytes_ = (misalign + count) * sizeof(T) + 2 * kAlign;
    bytes_ = (bytes_ + kAlign - 1) / kAlign * kAlign;
    raw_ = static_cast<char*>(std::aligned_alloc(kAlign, bytes_));
    data_ = reinterpret_cast<T*>(raw_ + kAlign + misalign * sizeof(T));
    std::memset(raw_, 0, bytes_);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(raw_, bytes_);
    __asan_unpoison_memory_region(data_, count * sizeof(T));
#endif
  }
  ~Buffer() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(raw_, bytes_);
#endif
    std::free(raw_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t k) { return data_[k]; }

 private:
  static constexpr size_t kAlign = 128;
  size_t count_, bytes_;
  char* raw_;
  T* data_;
};

}  // namespace cuda_emulation
