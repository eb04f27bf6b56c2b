// What one thread holds of one worker's row: V neighbouring coordinates of x, g and the state, in
// registers; how they are loaded and stored, and the rule applied to them.
//
// V coordinates of the compute type are 16 bytes: 4 floats or 2 doubles. x and g are then 16 bytes too,
// or 8 in a 16-bit storage type: 16 there would take every second 16 bytes of the state in one request
// of a warp, and twice the sectors. A warp still asks for 256 bytes in a row.
#pragma once

#include <cstdint>

#include "../rules/rule.h"
#include "device.h"

namespace qgm::cuda {

template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <class T, int V>
struct alignas(V * sizeof(T)) Vector {
  T at[V];
};

template <int V, class T>
QGM_HD Vector<T, V> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}

// Stores in one instruction. Assembly, because nvcc takes the assignment of a vector apart where it likes, and four
// 4-byte stores cost four times the bank conflicts and write requests of one 16-byte store.
template <class T, int V>
__device__ __forceinline__ void store_global(T* p, const Vector<T, V>& v) {
#if defined(__CUDA_ARCH__)
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (sizeof v == 16) {
    uint4 w;
    memcpy(&w, &v, sizeof w);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
                 : "memory");
  } else if constexpr (sizeof v == 8 && V > 1) {
    uint2 w;
    memcpy(&w, &v, sizeof w);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(w.x), "r"(w.y) : "memory");
  } else {
    static_assert(V == 1);
    p[0] = v.at[0];
  }
#else
  *reinterpret_cast<Vector<T, V>*>(p) = v;
#endif
}

template <class T, int V>
__device__ __forceinline__ void store_shared(T* p, const Vector<T, V>& v) {
#if defined(__CUDA_ARCH__)
  static_assert(sizeof v == 16);
  const unsigned address = unsigned(__cvta_generic_to_shared(p));
  uint4 w;
  memcpy(&w, &v, sizeof w);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
               : "memory");
#else
  *reinterpret_cast<Vector<T, V>*>(p) = v;
#endif
}

QGM_HD constexpr int count_bits(unsigned mask) { return mask == 0 ? 0 : int(mask & 1u) + count_bits(mask >> 1); }

// Which of a rule's vectors a fused step moves. A state that local() makes is not loaded for merge().
template <class Rule>
struct Traffic {
  static constexpr unsigned kLoads = Rule::kLocalReads | (Rule::kMergeReads & ~Rule::kLocalWrites);
  static constexpr unsigned kStores = Rule::kLocalWrites | Rule::kMergeWrites;
};

template <class Rule_, class Storage_, int V_>
struct Slice {
  using Rule = Rule_;
  using Storage = Storage_;
  using T = Compute<Storage>;
  static constexpr int V = V_;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kMessages = Rule::kMessages;
  using Messages = Values<Vector<T, V>, kMessages>;

  Vector<Storage, V> x, g;
  Values<Vector<T, V>, kStates> state;

  QGM_HD void local(const Rule& rule, Messages& message) {
    for (int v = 0; v < V; ++v) {
      Values<T, kStates> s;
      Values<T, kMessages> m;
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kLocalReads, k)) s[k] = state[k].at[v];
      }
      rule.local(widen(x.at[v]), widen(g.at[v]), s, m);
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kLocalWrites, k)) state[k].at[v] = s[k];
      }
      for (int k = 0; k < kMessages; ++k) message[k].at[v] = m[k];
    }
  }

  QGM_HD void merge(const Rule& rule, const Messages& mixed) {
    for (int v = 0; v < V; ++v) {
      T new_x = Rule::kMergeReadsX ? widen(x.at[v]) : T(0);
      Values<T, kStates> s;
      Values<T, kMessages> m;
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kMergeReads, k)) s[k] = state[k].at[v];
      }
      for (int k = 0; k < kMessages; ++k) m[k] = mixed[k].at[v];
      rule.merge(new_x, Rule::kMergeReadsGrad ? widen(g.at[v]) : T(0), s, m);
      x.at[v] = narrow<Storage>(new_x);
      for (int k = 0; k < kStates; ++k) {
        if (has_bit(Rule::kMergeWrites, k)) state[k].at[v] = s[k];
      }
    }
  }

  // The states of a mask, at element `offset` of each state vector.
  template <unsigned kMask>
  QGM_HD void load_states(const Values<T*, kStates>& from, int64_t offset) {
    for (int k = 0; k < kStates; ++k) {
      if (has_bit(kMask, k)) state[k] = load_vector<V>(from[k] + offset);
    }
  }

  template <unsigned kMask>
  __device__ __forceinline__ void store_states(const Values<T*, kStates>& to, int64_t offset) const {
    for (int k = 0; k < kStates; ++k) {
      if (has_bit(kMask, k)) store_global(to[k] + offset, state[k]);
    }
  }
};

template <class T, int V, int N>
QGM_HD void add_product(Values<Vector<T, V>, N>& sum, int k, T weight, const Vector<T, V>& term) {
  for (int v = 0; v < V; ++v) sum[k].at[v] = sum[k].at[v] + weight * term.at[v];
}

template <class T, int V>
QGM_HD void add_squares(Vector<T, V>& sum, const Vector<T, V>& term) {
  for (int v = 0; v < V; ++v) sum.at[v] = sum.at[v] + term.at[v] * term.at[v];
}

template <class T, int V>
QGM_HD Vector<T, V> product(T weight, const Vector<T, V>& term) {
  Vector<T, V> out;
  for (int v = 0; v < V; ++v) out.at[v] = weight * term.at[v];
  return out;
}

}  // namespace qgm::cuda
