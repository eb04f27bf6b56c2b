// QG-DAdam: Adam whose moments follow the model difference of a whole step, normalised to length one.
//
// delta is x - x_new of the step before (0 at the start), q = 1 / (||delta|| + eps) over the whole model, from the
// caller, one for each worker. Folding the moments' update into the next step, which knows the norm, leaves one pass a
// step:
//   d = q delta;  v_hat <- b2 v_hat + (1 - b2) d^2;  g' = g + wd x;  v = b2 v_hat + (1 - b2) g'^2
//   qg_dadam:     m_hat <- b1 m_hat + (1 - b1) d;  m = b1 m_hat + g'
//   qg_dadam_v1:  m_hat likewise;  g' = s g + wd x;  m = b1 m_hat + (1 - b1) g'
//   qg_dadam_v2:  m <- b1 m + (1 - b1) g', kept: the ordinary local moment
//   x_half = x - eta / c1 * m / (sqrt(v) / c2 + eps_adam),  x_new = sum_j w_ij x_half_j
// with c1 = 1 - b1^t, c2 = sqrt(1 - b2^t), t from 1, both from the caller. s = 1 / (||g|| + eps) over the filter that a
// coordinate belongs to is a vector that the caller writes before each step. v, and m of the first two, are temporary.
//
// Source: epfml/quasi-global-momentum, decentralized_qg_adam (v0) and its variants.
#pragma once

#include "rule.h"

namespace qgm::rules::qg_dadam {

enum class Variant { kV0, kV1, kV2 };

template <class T, Variant kVariant>
struct QuasiGlobalAdam {
  static constexpr bool kNormalised = kVariant == Variant::kV1, kLocalMoment = kVariant == Variant::kV2;
  static constexpr const char* kName = kNormalised ? "qg_dadam_v1" : kLocalMoment ? "qg_dadam_v2" : "qg_dadam";
  static constexpr int kHyper = 7;                     // eta, b1, b2, eps, wd, c1, c2
  static constexpr int kRowScalars = 1;                // q
  static constexpr int kStates = kNormalised ? 4 : 3;  // m_hat (m in v2), v_hat, delta, s
  static constexpr int kNormState = 2;
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = kNormalised ? 15 : 7, kLocalWrites = 3, kMergeReads = 0, kMergeWrites = 4;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  T size, b1, one_b1, b2, one_b2, eps, wd, scale, q;

  explicit QuasiGlobalAdam(const double* hyper)
      : size(T(hyper[0] / hyper[5])),
        b1(T(hyper[1])),
        one_b1(T(1.0 - hyper[1])),
        b2(T(hyper[2])),
        one_b2(T(1.0 - hyper[2])),
        eps(T(hyper[3])),
        wd(T(hyper[4])),
        scale(T(1.0 / hyper[6])),
        q(T(1)) {}

  QGM_HD void set_row(const T* scalars) { q = scalars[0]; }

  QGM_HD void local(T x, T g, Values<T, kStates>& state, Values<T, 1>& x_half) const {
    const T d = q * state[2];
    const T decayed = (kNormalised ? state[kStates - 1] * g : g) + wd * x;
    state[0] = b1 * state[0] + one_b1 * (kLocalMoment ? decayed : d);
    state[1] = b2 * state[1] + one_b2 * (d * d);
    const T m = kLocalMoment ? state[0] : b1 * state[0] + (kNormalised ? one_b1 * decayed : decayed);
    const T v = b2 * state[1] + one_b2 * (decayed * decayed);
    x_half[0] = x - size * m / (square_root(v) * scale + eps);
  }

  QGM_HD void merge(T& x, T, Values<T, kStates>& state, const Values<T, 1>& mixed) const {
    state[2] = x - mixed[0];
    x = mixed[0];
  }
};

template <class T>
using QgDadam = QuasiGlobalAdam<T, Variant::kV0>;
template <class T>
using QgDadamV1 = QuasiGlobalAdam<T, Variant::kV1>;
template <class T>
using QgDadamV2 = QuasiGlobalAdam<T, Variant::kV2>;

using Rules = RuleList<QgDadam, QgDadamV1, QgDadamV2>;

}  // namespace qgm::rules::qg_dadam
