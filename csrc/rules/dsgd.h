// DSGD, DSGDm and DSGDm-N: a local (momentum) SGD step, then gossip averaging.
//
// x_i_half = x_i - eta u_i,  x_i <- sum_j w_ij x_j_half          (adapt, then combine)
// g' = g + wd x;  m_i <- beta m_i + g';  u_i = g' (dsgd) | m_i (dsgdm) | g' + beta m_i (dsgdm_n)
// m is a trace, as in torch.optim.SGD; it is never communicated.
// dsgd_cta combines first: x_i <- sum_j w_ij x_j - eta g'_i, with g' still at the old x_i.
// Source: Lian et al. 2017 (arXiv 1705.09056) for D-PSGD; momentum as in epfml/quasi-global-momentum,
// decentralized_sgd. Weight decay is coupled (added to the gradient before the momentum).
#pragma once

#include "rule.h"

namespace qgm::rules::dsgd {

template <class T>
struct Dsgd {
  static constexpr const char* kName = "dsgd";
  static constexpr int kHyper = 2;  // eta, wd
  static constexpr int kStates = 0;
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 0, kLocalWrites = 0, kMergeReads = 0, kMergeWrites = 0;
  static constexpr bool kMergeReadsX = false, kMergeReadsGrad = false;

  T eta, wd;

  explicit Dsgd(const double* hyper) : eta(T(hyper[0])), wd(T(hyper[1])) {}

  QGM_HD void local(T x, T g, Values<T, 0>&, Values<T, 1>& x_half) const { x_half[0] = x - eta * (g + wd * x); }

  QGM_HD void merge(T& x, T, Values<T, 0>&, const Values<T, 1>& mixed) const { x = mixed[0]; }
};

template <class T>
struct DsgdCta {
  static constexpr const char* kName = "dsgd_cta";
  static constexpr int kHyper = 2;  // eta, wd
  static constexpr int kStates = 0;
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 0, kLocalWrites = 0, kMergeReads = 0, kMergeWrites = 0;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, wd;

  explicit DsgdCta(const double* hyper) : eta(T(hyper[0])), wd(T(hyper[1])) {}

  QGM_HD void local(T x, T, Values<T, 0>&, Values<T, 1>& sent) const { sent[0] = x; }

  QGM_HD void merge(T& x, T g, Values<T, 0>&, const Values<T, 1>& mixed) const { x = mixed[0] - eta * (g + wd * x); }
};

template <class T, bool kNesterov>
struct Momentum {
  static constexpr const char* kName = kNesterov ? "dsgdm_n" : "dsgdm";
  static constexpr int kHyper = 3;   // eta, beta, wd
  static constexpr int kStates = 1;  // m
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 1, kMergeReads = 0, kMergeWrites = 0;
  static constexpr bool kMergeReadsX = false, kMergeReadsGrad = false;

  T eta, beta, wd;

  explicit Momentum(const double* hyper) : eta(T(hyper[0])), beta(T(hyper[1])), wd(T(hyper[2])) {}

  QGM_HD void local(T x, T g, Values<T, 1>& m, Values<T, 1>& x_half) const {
    const T decayed = g + wd * x;
    m[0] = beta * m[0] + decayed;
    const T u = kNesterov ? decayed + beta * m[0] : m[0];
    x_half[0] = x - eta * u;
  }

  QGM_HD void merge(T& x, T, Values<T, 1>&, const Values<T, 1>& mixed) const { x = mixed[0]; }
};

template <class T>
using Dsgdm = Momentum<T, false>;
template <class T>
using DsgdmN = Momentum<T, true>;

using Rules = RuleList<Dsgd, DsgdCta, Dsgdm, DsgdmN>;

}  // namespace qgm::rules::dsgd
