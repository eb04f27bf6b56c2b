// Compiles every rule of a header for every storage type and enters it in the table.
//
// setup.py writes one small source file per header of csrc/rules, which calls register_rules; nothing
// else knows which rules exist.
#pragma once

#include "gossip_step.h"
#include "process_step.h"
#include "table.h"

namespace qgm::cuda {

template <template <class> class RuleOf>
RuleEntry make_entry() {
  using Rule = RuleOf<float>;
  static_assert(Rule::kStates <= kMaxStates && Rule::kMessages <= kMaxMessages);
  return {Rule::kName,
          Rule::kHyper,
          Rule::kStates,
          Rule::kMessages,
          Rule::kMergeReadsX,
          Rule::kMergeReadsGrad,
          {gossip_step<RuleOf, float>, gossip_step<RuleOf, double>, gossip_step<RuleOf, bfloat16>,
           gossip_step<RuleOf, float16>},
          {local_step<RuleOf, float>, local_step<RuleOf, double>, local_step<RuleOf, bfloat16>,
           local_step<RuleOf, float16>},
          {merge<RuleOf, float>, merge<RuleOf, double>, merge<RuleOf, bfloat16>, merge<RuleOf, float16>}};
}

// The kernels here don't take row scalars: a rule that has them is left out, and its use is an error.
template <template <class> class RuleOf>
void register_rule() {
  if constexpr (kRowScalars<RuleOf<float>> == 0) registry().push_back(make_entry<RuleOf>());
}

template <template <class> class... RuleOf>
bool register_rules(RuleList<RuleOf...>) {
  (register_rule<RuleOf>(), ...);
  return true;
}

}  // namespace qgm::cuda
