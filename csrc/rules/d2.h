// D2, D2+ and exact diffusion: a correction that takes away the bias of DSGD.
//
// g' = g + wd x at the old x.
// d2:               x_new = sum_j w_ij (x + (x - x_prev) - eta (g' - g'_prev))_j
//                   state: x - x_prev and g'_prev, both 0 at the start, so the first step is DSGD's
// d2_plus:          x_new = sum_j w_ij (x - eta (g' + c))_j,  c <- (x - x_new) / eta - g'
//                   the difference is scaled by the step size that made it: right after a change of eta
// exact_diffusion:  psi = x - eta g';  x_new = sum_j w_ij (psi + c)_j,  c <- x_new - psi
//                   to be mixed with (I + W) / 2
//
// Sources: epfml/quasi-global-momentum, decentralized_d2 and decentralized_d2_v1; Bluefog, exact diffusion.
// With eta = 0 the difference of d2_plus has no scale: c stays.
#pragma once

#include "rule.h"

namespace qgm::rules::d2 {

template <class T>
struct D2 {
  static constexpr const char* kName = "d2";
  static constexpr int kHyper = 2;   // eta, wd
  static constexpr int kStates = 2;  // x - x_prev, g_prev
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 3, kLocalWrites = 0, kMergeReads = 0, kMergeWrites = 3;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, wd;

  explicit D2(const double* hyper) : eta(T(hyper[0])), wd(T(hyper[1])) {}

  QGM_HD void local(T x, T g, Values<T, 2>& state, Values<T, 1>& x_half) const {
    x_half[0] = x + state[0] - eta * (g + wd * x - state[1]);
  }

  QGM_HD void merge(T& x, T g, Values<T, 2>& state, const Values<T, 1>& mixed) const {
    state[0] = mixed[0] - x;
    state[1] = g + wd * x;
    x = mixed[0];
  }
};

template <class T>
struct D2Plus {
  static constexpr const char* kName = "d2_plus";
  static constexpr int kHyper = 2;   // eta, wd
  static constexpr int kStates = 1;  // c
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 1, kMergeWrites = 1;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, wd, per_eta;
  bool moves;

  explicit D2Plus(const double* hyper)
      : eta(T(hyper[0])), wd(T(hyper[1])), per_eta(T(hyper[0] == 0.0 ? 0.0 : 1.0 / hyper[0])), moves(hyper[0] != 0.0) {}

  QGM_HD void local(T x, T g, Values<T, 1>& c, Values<T, 1>& x_half) const {
    x_half[0] = x - eta * (g + wd * x + c[0]);
  }

  QGM_HD void merge(T& x, T g, Values<T, 1>& c, const Values<T, 1>& mixed) const {
    const T updated = per_eta * (x - mixed[0]) - (g + wd * x);
    c[0] = moves ? updated : c[0];
    x = mixed[0];
  }
};

template <class T>
struct ExactDiffusion {
  static constexpr const char* kName = "exact_diffusion";
  static constexpr int kHyper = 2;   // eta, wd
  static constexpr int kStates = 1;  // c
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 0, kMergeWrites = 1;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, wd;

  explicit ExactDiffusion(const double* hyper) : eta(T(hyper[0])), wd(T(hyper[1])) {}

  QGM_HD void local(T x, T g, Values<T, 1>& c, Values<T, 1>& phi) const { phi[0] = x - eta * (g + wd * x) + c[0]; }

  QGM_HD void merge(T& x, T g, Values<T, 1>& c, const Values<T, 1>& mixed) const {
    c[0] = mixed[0] - (x - eta * (g + wd * x));
    x = mixed[0];
  }
};

using Rules = RuleList<D2, D2Plus, ExactDiffusion>;

}  // namespace qgm::rules::d2
