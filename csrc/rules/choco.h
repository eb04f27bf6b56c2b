// CHOCO-SGD in two passes around a compressor, which needs whole vectors.
//
// choco_send:     g' = g + wd x;  m <- beta m + g';  u = m, or g' + beta m if nesterov
//                 x <- x - eta u + gamma (a - x_hat);  q <- x - x_hat       (mixed with W = I)
// then q is compressed in place, and is the message of
// choco_receive:  x_hat <- x_hat + q;  a <- a + sum_j w_ij q_j;  x <- x + gamma (a - x_hat)
//
// gamma is 0 in one of the two: in choco_send for the order of the paper ("atc"), in choco_receive for the
// order of the published codes ("cta"). a is sum_j w_ij x_hat_j.
// Source: Koloskova, Stich, Jaggi (ICML 2019, arXiv 1902.00340); epfml/ChocoSGD.
#pragma once

#include "rule.h"

namespace qgm::rules::choco {

template <class T>
struct Send {
  static constexpr const char* kName = "choco_send";
  static constexpr int kHyper = 5;   // eta, beta, wd, gamma, nesterov (0 or 1)
  static constexpr int kStates = 4;  // m, x_hat, a, q
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 7, kLocalWrites = 1, kMergeReads = 2, kMergeWrites = 8;
  static constexpr bool kMergeReadsX = false, kMergeReadsGrad = false;

  T eta, beta, wd, gamma;
  bool nesterov;

  explicit Send(const double* hyper)
      : eta(T(hyper[0])), beta(T(hyper[1])), wd(T(hyper[2])), gamma(T(hyper[3])), nesterov(hyper[4] != 0.0) {}

  QGM_HD void local(T x, T g, Values<T, 4>& state, Values<T, 1>& x_half) const {
    const T decayed = g + wd * x;
    state[0] = beta * state[0] + decayed;
    const T u = nesterov ? decayed + beta * state[0] : state[0];
    x_half[0] = x - eta * u + gamma * (state[2] - state[1]);
  }

  QGM_HD void merge(T& x, T, Values<T, 4>& state, const Values<T, 1>& mixed) const {
    x = mixed[0];
    state[3] = x - state[1];
  }
};

template <class T>
struct Receive {
  static constexpr const char* kName = "choco_receive";
  static constexpr int kHyper = 1;   // gamma
  static constexpr int kStates = 3;  // x_hat, a, q
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 4, kLocalWrites = 0, kMergeReads = 7, kMergeWrites = 3;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = false;

  T gamma;

  explicit Receive(const double* hyper) : gamma(T(hyper[0])) {}

  QGM_HD void local(T, T, Values<T, 3>& state, Values<T, 1>& sent) const { sent[0] = state[2]; }

  QGM_HD void merge(T& x, T, Values<T, 3>& state, const Values<T, 1>& mixed) const {
    state[0] = state[0] + state[2];
    state[1] = state[1] + mixed[0];
    x = x + gamma * (state[1] - state[0]);
  }
};

using Rules = RuleList<Send, Receive>;

}  // namespace qgm::rules::choco
