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
// What a mask leaves out is not loaded and not stored, so the masks are the memory traffic of the
// rule. A rule calls no library function and has no loop over workers; operations happen in the
// written order (no contraction, no re-association), which makes the bits equal everywhere.
//
// A header of this directory ends with `using Rules = RuleList<...>` in the namespace
// qgm::rules::<name of the header>. The build finds the header by itself (setup.py) and compiles every rule in it.
#pragma once

#include "../numeric.h"

namespace qgm {

template <template <class> class... Rule>
struct RuleList {};

QGM_HD constexpr bool has_bit(unsigned mask, int k) { return (mask >> k) & 1u; }

}  // namespace qgm
