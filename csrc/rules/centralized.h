// The centralised methods, and the outer step of SlowMo: what needs the exact mean of all workers.
//
// csgd, csgdm, csgdm_n, cadam: the message is g, mixed[0] the mean gradient; weight decay after the mean.
//   g' = gbar + wd x;  m <- beta m + g';  x <- x - eta (g' | m | g' + beta m);  Adam as in adam.h
// slowmo_outer: the message is x, mixed[0] their mean xbar; s is the slow iterate, u its momentum.
//   u <- beta u + (s - xbar) / eta;  s <- s - alpha eta u;  x <- s
//   With eta = 0 u stays, and x is what the limit of small eta gives.
//
// Sources: epfml/quasi-global-momentum, centralized_sgd, centralized_adam and decentralized_sgd.
#pragma once

#include "rule.h"

namespace qgm::rules::centralized {

enum class Form { kPlain, kHeavyBall, kNesterov };

template <class T, Form kForm>
struct Sgd {
  static constexpr const char* kName =
      kForm == Form::kPlain ? "csgd" : (kForm == Form::kHeavyBall ? "csgdm" : "csgdm_n");
  static constexpr int kHyper = 3;                               // eta, beta, wd
  static constexpr int kStates = kForm == Form::kPlain ? 0 : 1;  // m
  static constexpr int kMessages = 1;
  static constexpr unsigned kState = kForm == Form::kPlain ? 0 : 1;
  static constexpr unsigned kLocalReads = 0, kLocalWrites = 0, kMergeReads = kState, kMergeWrites = kState;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  T eta, beta, wd;

  explicit Sgd(const double* hyper) : eta(T(hyper[0])), beta(T(hyper[1])), wd(T(hyper[2])) {}

  QGM_HD void local(T, T g, Values<T, kStates>&, Values<T, 1>& sent) const { sent[0] = g; }

  QGM_HD void merge(T& x, T, Values<T, kStates>& state, const Values<T, 1>& mixed) const {
    const T decayed = mixed[0] + wd * x;
    T u = decayed;
    if (kForm != Form::kPlain) {
      state[0] = beta * state[0] + decayed;
      u = kForm == Form::kNesterov ? decayed + beta * state[0] : state[0];
    }
    x = x - eta * u;
  }
};

template <class T>
struct Cadam {
  static constexpr const char* kName = "cadam";
  static constexpr int kHyper = 7;   // eta, b1, b2, eps, wd, c1, c2
  static constexpr int kStates = 2;  // m, v
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 0, kLocalWrites = 0, kMergeReads = 3, kMergeWrites = 3;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  T size, b1, one_b1, b2, one_b2, eps, wd, scale;

  explicit Cadam(const double* hyper)
      : size(T(hyper[0] / hyper[5])),
        b1(T(hyper[1])),
        one_b1(T(1.0 - hyper[1])),
        b2(T(hyper[2])),
        one_b2(T(1.0 - hyper[2])),
        eps(T(hyper[3])),
        wd(T(hyper[4])),
        scale(T(1.0 / hyper[6])) {}

  QGM_HD void local(T, T g, Values<T, 2>&, Values<T, 1>& sent) const { sent[0] = g; }

  QGM_HD void merge(T& x, T, Values<T, 2>& state, const Values<T, 1>& mixed) const {
    const T decayed = mixed[0] + wd * x;
    state[0] = b1 * state[0] + one_b1 * decayed;
    state[1] = b2 * state[1] + one_b2 * (decayed * decayed);
    x = x - size * state[0] / (square_root(state[1]) * scale + eps);
  }
};

template <class T>
struct SlowmoOuter {
  static constexpr const char* kName = "slowmo_outer";
  static constexpr int kHyper = 3;   // eta, beta, alpha
  static constexpr int kStates = 2;  // s, u
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 0, kLocalWrites = 0, kMergeReads = 3, kMergeWrites = 3;
  static constexpr bool kMergeReadsX = false, kMergeReadsGrad = false;

  T eta_beta, alpha, per_eta;
  bool moves;

  explicit SlowmoOuter(const double* hyper)
      : eta_beta(T(hyper[0] * hyper[1])),
        alpha(T(hyper[2])),
        per_eta(T(hyper[0] == 0.0 ? 0.0 : 1.0 / hyper[0])),
        moves(hyper[0] != 0.0) {}

  QGM_HD void local(T x, T, Values<T, 2>&, Values<T, 1>& sent) const { sent[0] = x; }

  QGM_HD void merge(T& x, T, Values<T, 2>& state, const Values<T, 1>& mixed) const {
    const T displacement = eta_beta * state[1] + (state[0] - mixed[0]);  // eta u
    state[0] = state[0] - alpha * displacement;
    state[1] = moves ? per_eta * displacement : state[1];
    x = state[0];
  }
};

template <class T>
using Csgd = Sgd<T, Form::kPlain>;
template <class T>
using Csgdm = Sgd<T, Form::kHeavyBall>;
template <class T>
using CsgdmN = Sgd<T, Form::kNesterov>;

using Rules = RuleList<Csgd, Csgdm, CsgdmN, Cadam, SlowmoOuter>;

}  // namespace qgm::rules::centralized
