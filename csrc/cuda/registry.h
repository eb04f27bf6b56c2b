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
  static_assert(!kHasNorm<Rule> || has_bit(Rule::kMergeWrites, kNormState<Rule>));
  return {Rule::kName,
          Rule::kHyper,
          Rule::kStates,
          Rule::kMessages,
          kRowScalars<Rule>,
          Rule::kMergeReadsX,
          Rule::kMergeReadsGrad,
          kNormState<Rule>,
          {gossip_step<RuleOf, float>, gossip_step<RuleOf, double>, gossip_step<RuleOf, bfloat16>,
           gossip_step<RuleOf, float16>},
          {local_step<RuleOf, float>, local_step<RuleOf, double>, local_step<RuleOf, bfloat16>,
           local_step<RuleOf, float16>},
          {merge<RuleOf, float>, merge<RuleOf, double>, merge<RuleOf, bfloat16>, merge<RuleOf, float16>}};
}

template <template <class> class... RuleOf>
bool register_rules(RuleList<RuleOf...>) {
  (registry().push_back(make_entry<RuleOf>()), ...);
  return true;
}

}  // namespace qgm::cuda
