// QG-DSGDm and QG-DSGDm-N: momentum that follows the difference of the model over a whole step,
// gossip included, instead of the local gradient.
//
// g' = g + wd x;  m = beta m_hat + g'  (temporary);  u = m | g' + beta m  (-N)
// x_half = x - eta u;  x_new = sum_j w_ij x_half_j
// m_hat <- mu m_hat + (1 - mu) (x - x_new) / eta        (an average, not a trace; never communicated)
//
// Source: Lin, Karimireddy, Stich, Jaggi, "Quasi-Global Momentum" (ICML 2021, arXiv 2102.04761),
// Algorithm 1, and the authors' decentralized_qg_sgd. The division by eta is folded into one
// coefficient, (1 - mu) / eta, taken in double and rounded once. With eta = 0 the difference is
// gossip alone and has no scale: m_hat is left as it is.
//
// The *Multistep rules are the authors' `local_step` = k > 1: v collects the differences, and m_hat
// takes their average on every k-th step (the caller says when by `update`); gossip runs every step.
#pragma once

#include "rule.h"

namespace qgm::rules::qg_dsgdm {

template <class T, bool kNesterov>
struct QuasiGlobal {
  static constexpr const char* kName = kNesterov ? "qg_dsgdm_n" : "qg_dsgdm";
  static constexpr int kHyper = 4;   // eta, beta, mu, wd
  static constexpr int kStates = 1;  // m_hat
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 1, kMergeWrites = 1;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  T eta, beta, wd, keep, gain;

  explicit QuasiGlobal(const double* hyper)
      : eta(T(hyper[0])),
        beta(T(hyper[1])),
        wd(T(hyper[3])),
        keep(T(hyper[0] == 0.0 ? 1.0 : hyper[2])),
        gain(T(hyper[0] == 0.0 ? 0.0 : (1.0 - hyper[2]) / hyper[0])) {}

  QGM_HD void local(T x, T g, Values<T, 1>& m_hat, Values<T, 1>& x_half) const {
    const T decayed = g + wd * x;
    const T m = beta * m_hat[0] + decayed;
    const T u = kNesterov ? decayed + beta * m : m;
    x_half[0] = x - eta * u;
  }

  QGM_HD void merge(T& x, T, Values<T, 1>& m_hat, const Values<T, 1>& mixed) const {
    const T x_new = mixed[0];
    m_hat[0] = keep * m_hat[0] + gain * (x - x_new);
    x = x_new;
  }
};

template <class T, bool kNesterov>
struct QuasiGlobalMultistep {
  static constexpr const char* kName = kNesterov ? "qg_dsgdm_n_multistep" : "qg_dsgdm_multistep";
  static constexpr int kHyper = 6;   // eta, beta, mu, wd, k, update (0 or 1)
  static constexpr int kStates = 2;  // m_hat, v
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 1, kLocalWrites = 0, kMergeReads = 3, kMergeWrites = 3;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  QuasiGlobal<T, kNesterov> single;
  T per_eta, keep, gain;
  bool update;

  explicit QuasiGlobalMultistep(const double* hyper)
      : single(hyper),
        per_eta(T(hyper[0] == 0.0 ? 0.0 : 1.0 / hyper[0])),
        keep(T(hyper[2])),
        gain(T((1.0 - hyper[2]) / hyper[4])),
        update(hyper[5] != 0.0 && hyper[0] != 0.0) {}

  QGM_HD void local(T x, T g, Values<T, 2>& state, Values<T, 1>& x_half) const {
    Values<T, 1> m_hat{{state[0]}};
    single.local(x, g, m_hat, x_half);
  }

  QGM_HD void merge(T& x, T, Values<T, 2>& state, const Values<T, 1>& mixed) const {
    const T x_new = mixed[0];
    const T v = state[1] + per_eta * (x - x_new);
    state[0] = update ? keep * state[0] + gain * v : state[0];
    state[1] = update ? T(0) : v;
    x = x_new;
  }
};

template <class T>
using QgDsgdm = QuasiGlobal<T, false>;
template <class T>
using QgDsgdmN = QuasiGlobal<T, true>;
template <class T>
using QgDsgdmMultistep = QuasiGlobalMultistep<T, false>;
template <class T>
using QgDsgdmNMultistep = QuasiGlobalMultistep<T, true>;

using Rules = RuleList<QgDsgdm, QgDsgdmN, QgDsgdmMultistep, QgDsgdmNMultistep>;

}  // namespace qgm::rules::qg_dsgdm
