// Global update tracking: GUT and QG-GUTm, descend, then mix.
//
// p is a worker's own model, r = sum_j w_ij (p_j - p_i), and x = p + gamma r the point at which the gradient is
// taken; the message is p. g' = g + wd x, eta' the step size of the step before, B = 1 + beta (+ beta^2 with -N).
//   delta = g' - r / eta'
//   y = delta - (mu / eta') (sum_j w_ij (p_j - p_j_prev) + B r_prev) - mu delta_prev
//   D = y | M | y + beta M,  M <- beta M + y;   p <- p - eta D + (gamma - gamma^2) r
// State: r, then s, all of y that the step before decides (y = g' + s), then M.
// With eta = 0 nothing moves, and r and s stay; the caller's eta' is the last one that was not 0.
//
// Source: aparna-aketi/global_update_tracking.
#pragma once

#include "rule.h"

namespace qgm::rules::gut {

enum class Form { kPlain, kHeavyBall, kNesterov };

template <class T, Form kForm>
struct Tracking {
  static constexpr const char* kName =
      kForm == Form::kPlain ? "gut" : (kForm == Form::kHeavyBall ? "qg_gutm" : "qg_gutm_n");
  static constexpr int kHyper = 6;                               // eta, eta', beta, mu, wd, gamma
  static constexpr int kStates = kForm == Form::kPlain ? 2 : 3;  // r, s, M
  static constexpr int kMessages = 1;
  static constexpr unsigned kAll = kForm == Form::kPlain ? 3 : 7;
  static constexpr unsigned kLocalReads = kAll, kLocalWrites = 0, kMergeReads = kAll, kMergeWrites = kAll;
  static constexpr bool kMergeReadsX = true, kMergeReadsGrad = true;

  T eta, per_eta, per_eta_before, beta, mu, wd, mu_per_eta, b, gamma, one_gamma, back;
  T moves;  // 1 or 0 (rule.h)

  explicit Tracking(const double* hyper)
      : eta(T(hyper[0])),
        per_eta(T(hyper[0] == 0.0 ? 0.0 : 1.0 / hyper[0])),
        per_eta_before(T(hyper[1] == 0.0 ? 0.0 : 1.0 / hyper[1])),
        beta(T(hyper[2])),
        mu(T(hyper[3])),
        wd(T(hyper[4])),
        mu_per_eta(T(hyper[0] == 0.0 ? 0.0 : hyper[3] / hyper[0])),
        b(T(kForm == Form::kNesterov ? 1.0 + hyper[2] + hyper[2] * hyper[2] : 1.0 + hyper[2])),
        gamma(T(hyper[5])),
        one_gamma(T(1.0 - hyper[5])),
        back(T(hyper[5] - hyper[5] * hyper[5])),
        moves(T(hyper[0] != 0.0)) {}

  // The own model after the step; M becomes the new one.
  QGM_HD T descend(T x, T g, T r, T s, T& m) const {
    const T y = g + wd * x + s;
    m = beta * m + y;
    const T d = kForm == Form::kPlain ? y : (kForm == Form::kHeavyBall ? m : y + beta * m);
    return x - gamma * r - eta * d + back * r;
  }

  QGM_HD void local(T x, T g, Values<T, kStates>& state, Values<T, 1>& p_new) const {
    T m = kForm == Form::kPlain ? T(0) : state[kStates - 1];
    p_new[0] = descend(x, g, state[0], state[1], m);
  }

  QGM_HD void merge(T& x, T g, Values<T, kStates>& state, const Values<T, 1>& mixed) const {
    const T r = state[0], s = state[1];
    T m = kForm == Form::kPlain ? T(0) : state[kStates - 1];
    const T p_new = descend(x, g, r, s, m);
    const T delta = g + wd * x - per_eta_before * r;
    const T r_new = mixed[0] - p_new;
    const T moved = mixed[0] - (x + one_gamma * r);  // x + (1 - gamma) r is the mean of the models of before
    const T s_new = T(0) - per_eta * r_new - mu_per_eta * (moved + b * r) - mu * delta;
    state[0] = moves != T(0) ? r_new : r;
    state[1] = moves != T(0) ? s_new : s;
    if (kForm != Form::kPlain) state[kStates - 1] = moves != T(0) ? m : state[kStates - 1];
    x = moves != T(0) ? gamma * mixed[0] + one_gamma * p_new : x;
  }
};

template <class T>
using Gut = Tracking<T, Form::kPlain>;
template <class T>
using QgGutm = Tracking<T, Form::kHeavyBall>;
template <class T>
using QgGutmN = Tracking<T, Form::kNesterov>;

using Rules = RuleList<Gut, QgGutm, QgGutmN>;

}  // namespace qgm::rules::gut
