// The loops over coordinates that every CPU driver is made of: a rule applied to one worker's row,
// and the sum over messages. No tiles, threads or workers here.
#pragma once

#include <cstdint>

#include "../rules/rule.h"

namespace qgm::cpu {

template <template <class> class RuleOf, class Compute>
struct RuleLoops {
  using T = Compute;
  using Rule = RuleOf<T>;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kMessages = Rule::kMessages;

  // One worker's rows of a tile, in the compute type (storage.h).
  struct Row {
    T* x;
    const T* g;
    Values<T*, kStates> state;

    // The same row from coordinate c on.
    QGM_HD Row from(int64_t c) const {
      Row r{x + c, g + c, state};
      for (int k = 0; k < kStates; ++k) r.state[k] += c;
      return r;
    }
  };

  // `length` is an integral constant where it can be: the compiler then drops the remainder loops.
  template <class Length>
  static QGM_HD void local(const Rule& rule, const Row& r, Length length, const Values<T*, kMessages>& out) {
    const int64_t count = length;
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) {
      Values<T, kStates> state;
      Values<T, kMessages> message;
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kLocalReads, k)) state[k] = r.state[k][c];
      }
      rule.local(r.x[c], r.g[c], state, message);
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kLocalWrites, k)) r.state[k][c] = state[k];
      }
      for (int k = 0; k < kMessages; ++k) out[k][c] = message[k];
    }
  }

  // mixed(k, c) is message k of coordinate c after mixing.
  template <class Length, class Mixed>
  static QGM_HD void merge(const Rule& rule, const Row& r, Length length, const Mixed& mixed) {
    const int64_t count = length;
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) {
      T x = Rule::kMergeReadsX ? r.x[c] : T(0);
      const T g = Rule::kMergeReadsGrad ? r.g[c] : T(0);
      Values<T, kStates> state;
      Values<T, kMessages> received;
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kMergeReads, k)) state[k] = r.state[k][c];
      }
      for (int k = 0; k < kMessages; ++k) received[k] = mixed(k, c);
      rule.merge(x, g, state, received);
      r.x[c] = x;
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kMergeWrites, k)) r.state[k][c] = state[k];
      }
    }
  }
};

// out = w_0 m_0 + w_1 m_1 + ..., strictly from left to right; message(q) is the q-th row.
template <class T, class Length, class Message>
QGM_HD void weighted_sum(const Message& message, const T* w, int64_t terms, Length length, T* out) {
  const int64_t count = length;
  const T* first = message(0);
  const T w_first = w[0];
  QGM_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < count; ++c) out[c] = w_first * first[c];
  int64_t q = 1;
  for (; q + 4 <= terms; q += 4) {
    const T *m0 = message(q), *m1 = message(q + 1), *m2 = message(q + 2), *m3 = message(q + 3);
    const T w0 = w[q], w1 = w[q + 1], w2 = w[q + 2], w3 = w[q + 3];
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) {
      out[c] = out[c] + w0 * m0[c] + w1 * m1[c] + w2 * m2[c] + w3 * m3[c];
    }
  }
  for (; q < terms; ++q) {
    const T* m0 = message(q);
    const T w0 = w[q];
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) out[c] = out[c] + w0 * m0[c];
  }
}

// out = (m_0 + m_1 + ...) (1 / terms), strictly from left to right.
template <class T, class Length, class Message>
QGM_HD void mean(const Message& message, int64_t terms, Length length, T* out) {
  const int64_t count = length;
  const T* first = message(0);
  for (int64_t c = 0; c < count; ++c) out[c] = first[c];
  for (int64_t q = 1; q < terms; ++q) {
    const T* m = message(q);
    QGM_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) out[c] = out[c] + m[c];
  }
  const T scale = T(1) / T(terms);
  for (int64_t c = 0; c < count; ++c) out[c] = out[c] * scale;
}

}  // namespace qgm::cpu
