// Push-sum: SGP and QG-SGP on directed graphs, whose columns sum to one and whose rows may not.
//
// A worker keeps the biased z = w x and the weight w; x = z / w is its model, where the gradient is taken.
// g' = g + wd z.  M is I + gamma (P - I), which the mixing does; w and w_new = M w come from the caller.
// sgp:     m <- beta m + g';  z_half = z - eta m;  z_new = sum_j M_ij z_half_j
// qg_sgp:  b = beta m_hat + g';  D = g' + beta b;  z_half = z - eta D;  z_new = sum_j M_ij z_half_j
//          m_hat <- beta m_hat + (1 - beta) D - (1 - beta) (z_new - z_half) / (eta w_new)
//          With eta = 0 the difference has no scale: m_hat stays.
//
// Source: aparna-aketi/qgm-sgp; Assran et al. (ICML 2019) for SGP.
#pragma once

#include "rule.h"

namespace qgm::rules::push_sum {

template <class T>
struct Sgp {
  static constexpr const char* kName = "sgp";
  static constexpr int kHyper = 3;       // eta, beta, wd
  static constexpr int kRowScalars = 2;  // w, w_new
  static constexpr int kStates = 1;      // m
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 1, kMergeReads = 0, kMergeWrites = 0;
  static constexpr bool kMergeReadsX = false, kMergeReadsGrad = false;

  T eta, beta, wd, w, w_new;

  explicit Sgp(const double* hyper) : eta(T(hyper[0])), beta(T(hyper[1])), wd(T(hyper[2])), w(T(1)), w_new(T(1)) {}

  QGM_HD void set_row(const T* scalars) {
    w = scalars[0];
    w_new = scalars[1];
  }

  QGM_HD void local(T x, T g, Values<T, 1>& m, Values<T, 1>& z_half) const {
    const T z = w * x;
    m[0] = beta * m[0] + (g + wd * z);
    z_half[0] = z - eta * m[0];
  }

  QGM_HD void merge(T& x, T, Values<T, 1>&, const Values<T, 1>& mixed) const { x = mixed[0] / w_new; }
};

template <class T>
struct QgSgp {
  static constexpr const char* kName = "qg_sgp";
  static constexpr int kHyper = 3;       // eta, beta, wd
  static constexpr int kRowScalars = 2;  // w, w_new
  static constexpr int kStates = 1;      // m_hat
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 1, kMergeWrites = 1;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, beta, one_beta, wd, gain, w, w_new;
  bool moves;

  explicit QgSgp(const double* hyper)
      : eta(T(hyper[0])),
        beta(T(hyper[1])),
        one_beta(T(1.0 - hyper[1])),
        wd(T(hyper[2])),
        gain(T(hyper[0] == 0.0 ? 0.0 : (1.0 - hyper[1]) / hyper[0])),
        w(T(1)),
        w_new(T(1)),
        moves(hyper[0] != 0.0) {}

  QGM_HD void set_row(const T* scalars) {
    w = scalars[0];
    w_new = scalars[1];
  }

  QGM_HD T direction(T z, T g, T m_hat) const {
    const T decayed = g + wd * z;
    return decayed + beta * (beta * m_hat + decayed);
  }

  QGM_HD void local(T x, T g, Values<T, 1>& m_hat, Values<T, 1>& z_half) const {
    const T z = w * x;
    z_half[0] = z - eta * direction(z, g, m_hat[0]);
  }

  QGM_HD void merge(T& x, T g, Values<T, 1>& m_hat, const Values<T, 1>& mixed) const {
    const T z = w * x;
    const T d = direction(z, g, m_hat[0]);
    const T z_half = z - eta * d;
    const T updated = beta * m_hat[0] + one_beta * d - gain * ((mixed[0] - z_half) / w_new);
    m_hat[0] = moves ? updated : m_hat[0];
    x = mixed[0] / w_new;
  }
};

using Rules = RuleList<Sgp, QgSgp>;

}  // namespace qgm::rules::push_sum
