// Momentum tracking and DecentLaM: momentum that heterogeneous data don't bias further.
//
// g' = g + wd x.
// momentum_tracking:  u <- beta u + g';  x_new = sum_j w_ij x_j - eta (u - c)      (new u, old c)
//                     c <- sum_j w_ij (c - u)_j + u;  sum_i c_i = 0 at every step. Two messages.
// momentum_tracking_start, once before the first step, mixed with the exact mean:
//                     u = c = (g - gbar) / (1 - beta), without weight decay; x stays
// decentlam:          d = (x - sum_j w_ij (x - eta g')_j) / eta;  m <- beta m + d;  x_new = x - eta m
//                     With eta = 0 d has no scale: m stays, x is mixed.
//
// Source: yukiTakezawa/MomentumTracking (both).
#pragma once

#include "rule.h"

namespace qgm::rules::momentum_tracking {

template <class T>
struct MomentumTracking {
  static constexpr const char* kName = "momentum_tracking";
  static constexpr int kHyper = 3;   // eta, beta, wd
  static constexpr int kStates = 2;  // u, c
  static constexpr int kMessages = 2;
  static constexpr unsigned kLocalReads = 3, kLocalWrites = 1, kMergeReads = 3, kMergeWrites = 2;
  static constexpr bool kMergeReadsX = false, kMergeReadsGrad = false;

  T eta, beta, wd;

  explicit MomentumTracking(const double* hyper) : eta(T(hyper[0])), beta(T(hyper[1])), wd(T(hyper[2])) {}

  QGM_HD void local(T x, T g, Values<T, 2>& state, Values<T, 2>& sent) const {
    state[0] = beta * state[0] + (g + wd * x);
    sent[0] = x;
    sent[1] = state[1] - state[0];
  }

  QGM_HD void merge(T& x, T, Values<T, 2>& state, const Values<T, 2>& mixed) const {
    x = mixed[0] - eta * (state[0] - state[1]);
    state[1] = mixed[1] + state[0];
  }
};

template <class T>
struct MomentumTrackingStart {
  static constexpr const char* kName = "momentum_tracking_start";
  static constexpr int kHyper = 1;   // beta
  static constexpr int kStates = 2;  // u, c
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 0, kLocalWrites = 0, kMergeReads = 0, kMergeWrites = 3;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T gain;

  explicit MomentumTrackingStart(const double* hyper) : gain(T(1.0 / (1.0 - hyper[0]))) {}

  QGM_HD void local(T, T g, Values<T, 2>&, Values<T, 1>& sent) const { sent[0] = g; }

  QGM_HD void merge(T&, T g, Values<T, 2>& state, const Values<T, 1>& mixed) const {
    state[0] = state[1] = gain * (g - mixed[0]);
  }
};

template <class T>
struct DecentLam {
  static constexpr const char* kName = "decentlam";
  static constexpr int kHyper = 3;   // eta, beta, wd
  static constexpr int kStates = 1;  // m
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 0, kLocalWrites = 0, kMergeReads = 1, kMergeWrites = 1;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  T eta, wd, keep, eta_beta, per_eta;

  explicit DecentLam(const double* hyper)
      : eta(T(hyper[0])),
        wd(T(hyper[2])),
        keep(T(hyper[0] == 0.0 ? 1.0 : hyper[1])),
        eta_beta(T(hyper[0] * hyper[1])),
        per_eta(T(hyper[0] == 0.0 ? 0.0 : 1.0 / hyper[0])) {}

  QGM_HD void local(T x, T g, Values<T, 1>&, Values<T, 1>& x_half) const { x_half[0] = x - eta * (g + wd * x); }

  // x - eta (beta m + d) is mixed - eta beta m: written so, no difference is divided and multiplied back.
  QGM_HD void merge(T& x, T, Values<T, 1>& m, const Values<T, 1>& mixed) const {
    const T x_new = mixed[0] - eta_beta * m[0];
    m[0] = keep * m[0] + per_eta * (x - mixed[0]);
    x = x_new;
  }
};

using Rules = RuleList<MomentumTracking, MomentumTrackingStart, DecentLam>;

}  // namespace qgm::rules::momentum_tracking
