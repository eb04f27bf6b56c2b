// D-Adam and DAMSGrad: Adam on every worker, then gossip averaging.
//
// g' = g + wd x;  m <- b1 m + (1 - b1) g';  v <- b2 v + (1 - b2) g'^2                      (both)
// d_adam:    x_half = x - eta / c1 * m / (sqrt(v) / c2 + eps),  x <- sum_j w_ij x_half_j
//            with c1 = 1 - b1^t, c2 = sqrt(1 - b2^t), t from 1, both from the caller
// damsgrad:  v_max <- max(v_max, v);  x <- sum_j w_ij x_j - eta m / sqrt(max(u_mixed, eps)),
//            u <- u_mixed - v_max_before + v_max,  u_mixed = sum_j w_ij u_j   (u tracks the mean v_max)
//
// Weight decay is coupled (L2), not decoupled. Sources: epfml/quasi-global-momentum, decentralized_adam;
// Chen et al. (arXiv 2109.03194) by way of a third party's code.
#pragma once

#include "rule.h"

namespace qgm::rules::adam {

template <class T>
struct DAdam {
  static constexpr const char* kName = "d_adam";
  static constexpr int kHyper = 7;   // eta, b1, b2, eps, wd, c1, c2
  static constexpr int kStates = 2;  // m, v
  static constexpr int kMessages = 1;
  static constexpr unsigned kLocalReads = 3, kLocalWrites = 3, kMergeReads = 0, kMergeWrites = 0;
  static constexpr bool kMergeReadsX = false, kMergeReadsGrad = false;

  T size, b1, one_b1, b2, one_b2, eps, wd, scale;

  explicit DAdam(const double* hyper)
      : size(T(hyper[0] / hyper[5])),
        b1(T(hyper[1])),
        one_b1(T(1.0 - hyper[1])),
        b2(T(hyper[2])),
        one_b2(T(1.0 - hyper[2])),
        eps(T(hyper[3])),
        wd(T(hyper[4])),
        scale(T(1.0 / hyper[6])) {}

  QGM_HD void local(T x, T g, Values<T, 2>& state, Values<T, 1>& x_half) const {
    const T decayed = g + wd * x;
    state[0] = b1 * state[0] + one_b1 * decayed;
    state[1] = b2 * state[1] + one_b2 * (decayed * decayed);
    x_half[0] = x - size * state[0] / (square_root(state[1]) * scale + eps);
  }

  QGM_HD void merge(T& x, T, Values<T, 2>&, const Values<T, 1>& mixed) const { x = mixed[0]; }
};

template <class T>
struct DAmsgrad {
  static constexpr const char* kName = "damsgrad";
  static constexpr int kHyper = 5;   // eta, b1, b2, eps, wd
  static constexpr int kStates = 4;  // m, v, v_max, u
  static constexpr int kMessages = 2;
  static constexpr unsigned kLocalReads = 8, kLocalWrites = 0, kMergeReads = 7, kMergeWrites = 15;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, b1, one_b1, b2, one_b2, eps, wd;

  explicit DAmsgrad(const double* hyper)
      : eta(T(hyper[0])),
        b1(T(hyper[1])),
        one_b1(T(1.0 - hyper[1])),
        b2(T(hyper[2])),
        one_b2(T(1.0 - hyper[2])),
        eps(T(hyper[3])),
        wd(T(hyper[4])) {}

  QGM_HD void local(T x, T, Values<T, 4>& state, Values<T, 2>& sent) const {
    sent[0] = x;
    sent[1] = state[3];
  }

  QGM_HD void merge(T& x, T g, Values<T, 4>& state, const Values<T, 2>& mixed) const {
    const T decayed = g + wd * x;
    const T before = state[2];
    state[0] = b1 * state[0] + one_b1 * decayed;
    state[1] = b2 * state[1] + one_b2 * (decayed * decayed);
    state[2] = larger(before, state[1]);
    x = mixed[0] - eta * state[0] / square_root(larger(mixed[1], eps));
    state[3] = mixed[1] - before + state[2];
  }
};

using Rules = RuleList<DAdam, DAmsgrad>;

}  // namespace qgm::rules::adam
