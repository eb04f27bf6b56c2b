// What a rule is: the arithmetic of one algorithm at one coordinate of one worker, and nothing else.
//
// The drivers (csrc/cpu, csrc/cuda) own memory, tiles, threads and communication; a rule owns the
// formulas. Each rule is a small struct, templated on the compute type T (float or double):
//
//   static constexpr const char* kName      its name in Python and in error messages
//   static constexpr int kHyper             how many hyper-parameters it takes
//   static constexpr int kStates            state vectors it keeps, e.g. 1 for m_hat
//   static constexpr int kMessages          vectors it sends to every neighbour in a step
//   static constexpr unsigned kLocalReads   the states that local() reads ...
//   static constexpr unsigned kLocalWrites  ... and writes,
//   static constexpr unsigned kMergeReads   the states that merge() reads ...
//   static constexpr unsigned kMergeWrites  ... and writes: bit k stands for state k
//   static constexpr bool kMergeReadsX      merge() needs x from before the step
//   static constexpr bool kMergeReadsGrad   merge() needs g
//
//   explicit Rule(const double* hyper)      derives the coefficients in double, rounds them once to T
//   void local(T x, T g, Values<T, kStates>& state, Values<T, kMessages>& message) const
//       before communication: makes the message(s)
//   void merge(T& x, T g, Values<T, kStates>& state, const Values<T, kMessages>& mixed) const
//       after it: mixed[k] = sum_j w_ij message_j[k]; makes the new x and state
//
// A rule may also have numbers of its own for each worker (a push-sum weight, a norm):
//
//   static constexpr int kRowScalars        how many; a rule without the constant has none
//   void set_row(const T* scalars)          takes those of one worker, before local() and merge() of its row
//
// and a state whose norm it needs in the next step:
//
//   static constexpr int kNormState         one that merge() writes: the pass sums the squares of each worker's, block
//                                           by block in the order of ../arguments.h
//
// What a mask leaves out is not loaded and not stored, so the masks are the memory traffic of the
// rule. A rule calls nothing but the helpers of numeric.h and has no loop over workers; operations happen in the
// written order (no contraction, no re-association), which makes the bits equal everywhere. A flag that several values
// depend on is kept as a T: GCC makes no vector loop of such choices by a bool.
//
// A header of this directory ends with `using Rules = RuleList<...>` in the namespace
// qgm::rules::<name of the header>. The build finds the header by itself (setup.py) and compiles every rule in it.
#pragma once

#include "../numeric.h"

namespace qgm {

template <template <class> class... Rule>
struct RuleList {};

template <class Rule, class = void>
struct RowScalarsOf {
  static constexpr int value = 0;
};
template <class Rule>
struct RowScalarsOf<Rule, decltype(void(Rule::kRowScalars))> {
  static constexpr int value = Rule::kRowScalars;
};
template <class Rule>
constexpr int kRowScalars = RowScalarsOf<Rule>::value;

template <class Rule, class = void>
struct NormStateOf {
  static constexpr int value = -1;
};
template <class Rule>
struct NormStateOf<Rule, decltype(void(Rule::kNormState))> {
  static constexpr int value = Rule::kNormState;
};
template <class Rule>
constexpr int kNormState = NormStateOf<Rule>::value;
template <class Rule>
constexpr bool kHasNorm = kNormState<Rule> >= 0;

// The rule as worker i runs it; scalars is [rows, kRowScalars].
template <class Rule, class T>
QGM_HD Rule for_row(const Rule& rule, const T* scalars, int64_t i) {
  Rule own = rule;
  if constexpr (kRowScalars<Rule> > 0) own.set_row(scalars + i * kRowScalars<Rule>);
  return own;
}

QGM_HD constexpr bool has_bit(unsigned mask, int k) { return (mask >> k) & 1u; }

}  // namespace qgm
