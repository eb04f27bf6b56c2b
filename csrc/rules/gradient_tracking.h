// Gradient tracking: workers also gossip a vector y whose mean is the mean gradient.
//
// g' = g + wd x.  State c = sum_j w_ij y_j - g' of the last step, 0 at the start: y = c + g' then is
// sum_j w_ij y_prev_j + g' - g'_prev, and g' itself in the first step. Two messages.
// gradient_tracking:      x_new = sum_j w_ij x_j - eta y
// gradient_tracking_m:    M <- beta M + y;  x_new = sum_j w_ij x_j - eta M        (y before it is mixed)
// gradient_tracking_m_n:  the same with eta (y + beta M)
// gradient_tracking_atc:  u = -eta g';  v = c + u;  x_new = sum_j w_ij (x + v)_j,  c <- sum_j w_ij v_j - u
//                         (tracks displacements, so changes of eta, too)
//
// Sources: epfml/quasi-global-momentum (DIGing form, momentum), Bluefog, epfml/relaysgd (adapt, then combine).
#pragma once

#include "rule.h"

namespace qgm::rules::gradient_tracking {

template <class T>
struct GradientTracking {
  static constexpr const char* kName = "gradient_tracking";
  static constexpr int kHyper = 2;   // eta, wd
  static constexpr int kStates = 1;  // c
  static constexpr int kMessages = 2;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 1, kMergeWrites = 1;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, wd;

  explicit GradientTracking(const double* hyper) : eta(T(hyper[0])), wd(T(hyper[1])) {}

  QGM_HD void local(T x, T g, Values<T, 1>& c, Values<T, 2>& sent) const {
    sent[0] = x;
    sent[1] = c[0] + (g + wd * x);
  }

  QGM_HD void merge(T& x, T g, Values<T, 1>& c, const Values<T, 2>& mixed) const {
    const T decayed = g + wd * x;
    x = mixed[0] - eta * (c[0] + decayed);
    c[0] = mixed[1] - decayed;
  }
};

template <class T, bool kNesterov>
struct GradientTrackingMomentum {
  static constexpr const char* kName = kNesterov ? "gradient_tracking_m_n" : "gradient_tracking_m";
  static constexpr int kHyper = 3;   // eta, beta, wd
  static constexpr int kStates = 2;  // c, M
  static constexpr int kMessages = 2;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 3, kMergeWrites = 3;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, beta, wd;

  explicit GradientTrackingMomentum(const double* hyper) : eta(T(hyper[0])), beta(T(hyper[1])), wd(T(hyper[2])) {}

  QGM_HD void local(T x, T g, Values<T, 2>& state, Values<T, 2>& sent) const {
    sent[0] = x;
    sent[1] = state[0] + (g + wd * x);
  }

  QGM_HD void merge(T& x, T g, Values<T, 2>& state, const Values<T, 2>& mixed) const {
    const T decayed = g + wd * x;
    const T y = state[0] + decayed;
    state[1] = beta * state[1] + y;
    x = mixed[0] - eta * (kNesterov ? y + beta * state[1] : state[1]);
    state[0] = mixed[1] - decayed;
  }
};

template <class T>
struct GradientTrackingAtc {
  static constexpr const char* kName = "gradient_tracking_atc";
  static constexpr int kHyper = 2;   // eta, wd
  static constexpr int kStates = 1;  // c
  static constexpr int kMessages = 2;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 0, kMergeWrites = 1;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, wd;

  explicit GradientTrackingAtc(const double* hyper) : eta(T(hyper[0])), wd(T(hyper[1])) {}

  QGM_HD void local(T x, T g, Values<T, 1>& c, Values<T, 2>& sent) const {
    const T v = c[0] - eta * (g + wd * x);
    sent[0] = x + v;
    sent[1] = v;
  }

  QGM_HD void merge(T& x, T g, Values<T, 1>& c, const Values<T, 2>& mixed) const {
    c[0] = mixed[1] + eta * (g + wd * x);
    x = mixed[0];
  }
};

template <class T>
using GradientTrackingM = GradientTrackingMomentum<T, false>;
template <class T>
using GradientTrackingMN = GradientTrackingMomentum<T, true>;

using Rules = RuleList<GradientTracking, GradientTrackingM, GradientTrackingMN, GradientTrackingAtc>;

}  // namespace qgm::rules::gradient_tracking
