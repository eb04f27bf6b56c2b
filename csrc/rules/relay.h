// RelaySGD/Grad: what is relayed over a tree is the local step, not the model (csrc/cpu/relay_step.h).
//
// g' = g + wd x;  m <- beta m + g';  u = -eta (g' | m | g' + beta m);  message u;  x <- x + mixed
// With gossip in place of the relay it is x + sum_j w_ij u_j: steps are averaged, models are not.
// The model variant, RelaySGD itself, uses dsgd, dsgdm and dsgdm_n (dsgd.h).
//
// Source: Vogels et al., "RelaySum" (NeurIPS 2021, arXiv 2110.04175); epfml/relaysgd.
#pragma once

#include "rule.h"

namespace qgm::rules::relay {

enum class Form { kPlain, kHeavyBall, kNesterov };

template <class T, Form kForm>
struct Grad {
  static constexpr const char* kName =
      kForm == Form::kPlain ? "relay_grad" : (kForm == Form::kHeavyBall ? "relay_grad_m" : "relay_grad_m_n");
  static constexpr int kHyper = kForm == Form::kPlain ? 2 : 3;   // eta, [beta,] wd
  static constexpr int kStates = kForm == Form::kPlain ? 0 : 1;  // m
  static constexpr int kMessages = 1;
  static constexpr unsigned kState = kForm == Form::kPlain ? 0 : 1;
  static constexpr unsigned kLocalReads = kState, kLocalWrites = kState, kMergeReads = 0, kMergeWrites = 0;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  T eta, beta, wd;

  explicit Grad(const double* hyper)
      : eta(T(hyper[0])), beta(T(kForm == Form::kPlain ? 0.0 : hyper[1])), wd(T(hyper[kHyper - 1])) {}

  QGM_HD void local(T x, T g, Values<T, kStates>& state, Values<T, 1>& u) const {
    const T decayed = g + wd * x;
    T direction = decayed;
    if (kForm != Form::kPlain) {
      state[0] = beta * state[0] + decayed;
      direction = kForm == Form::kNesterov ? decayed + beta * state[0] : state[0];
    }
    u[0] = T(0) - eta * direction;
  }

  QGM_HD void merge(T& x, T, Values<T, kStates>&, const Values<T, 1>& mixed) const { x = x + mixed[0]; }
};

template <class T>
using RelayGrad = Grad<T, Form::kPlain>;
template <class T>
using RelayGradM = Grad<T, Form::kHeavyBall>;
template <class T>
using RelayGradMN = Grad<T, Form::kNesterov>;

using Rules = RuleList<RelayGrad, RelayGradM, RelayGradMN>;

}  // namespace qgm::rules::relay
