// Temporary memory of a kernel: aligned to a cache line and zeroed. Small: a few tiles per thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace qgm::cpu {

template <class T>
class ScratchBuffer {
 public:
  explicit ScratchBuffer(int64_t count) : data_(new (kAlignment) T[size_t(count)]()) {}
  ~ScratchBuffer() { ::operator delete[](data_, kAlignment); }
  ScratchBuffer(const ScratchBuffer&) = delete;
  ScratchBuffer& operator=(const ScratchBuffer&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace qgm::cpu
