// Splits a range of independent tiles over threads: contiguous shares, no scheduling decisions.
//
// OpenMP in the extension, so that one pool serves PyTorch and us; std::thread under ThreadSanitizer,
// which does not understand GNU OpenMP (-DQGM_STD_THREADS).
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(QGM_STD_THREADS)
#include <thread>
#include <vector>
#endif

namespace qgm::cpu {

// Each thread gets at least so many elements, half a millisecond of work: on a busy machine a parallel
// region waits for its last thread to be scheduled, often for milliseconds. Tests of the threads lower it.
inline int64_t g_elements_per_thread = int64_t(1) << 20;

inline int threads_for(int64_t elements, int64_t tiles, int max_threads) {
  const int64_t useful = std::min(elements / g_elements_per_thread, tiles);
  return int(std::max<int64_t>(1, std::min<int64_t>(useful, max_threads)));
}

// Calls body(thread, begin, end) once for each thread's share of [0, count).
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads <= 1) {
    body(0, int64_t(0), count);
    return;
  }
  const auto share = [&](int thread) { body(thread, count * thread / threads, count * (thread + 1) / threads); };
#if defined(QGM_STD_THREADS)
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(share, t);
  share(0);
  for (auto& thread : pool) thread.join();
#else
  // schedule(static, 1): the shares stay the same also when the runtime grants fewer threads.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) share(t);
#endif
}

}  // namespace qgm::cpu
