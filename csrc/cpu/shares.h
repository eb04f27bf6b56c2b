// One pass over coordinates, in contiguous shares of the threads, each with scratch of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace qgm::cpu {

// Body has
//   run(a, first, last, scratch)    coordinates [first, last), whole pieces; compiled for every SIMD level
//   run_rest(a, begin, scratch)     the short piece at the end of the rows; once a pass, so one version is enough
// `share` is the smallest share of a thread, a multiple of `piece`; `scratch_size` is what a thread needs.
template <class Body, class T, class Arguments>
void run_in_shares(const Arguments& a, int64_t rows, int64_t cols, int64_t share, int64_t piece, int64_t scratch_size) {
  const int64_t whole = cols / piece * piece, shares = (cols + share - 1) / share;
  const int threads = threads_for(rows * cols, shares, a.threads);
  const ScratchBuffer<T> scratch(threads * scratch_size);
  parallel_for(shares, threads, [&](int thread, int64_t first, int64_t last) {
    T* const mine = scratch.data() + thread * scratch_size;
    const int64_t end = std::min(last * share, cols);
    SimdLevels<Body, const Arguments&, int64_t, int64_t, T*>::run(a.simd, a, first * share, std::min(end, whole), mine);
    if (end > whole) Body::run_rest(a, whole, mine);
  });
}

}  // namespace qgm::cpu
