// The table of compiled rules: name -> what the rule needs, and its kernels for each storage type.
//
// setup.py writes one small source file per header of csrc/rules, which calls register_rules; nothing
// else knows which rules exist.
#pragma once

#include <string>
#include <vector>

#include "gossip_step.h"
#include "process_step.h"

namespace qgm::cpu {

struct RuleEntry {
  std::string name;
  int hyper, states, messages, row_scalars;
  bool merge_reads_x, merge_reads_grad;
  int norm_state;  // -1: none
  void (*gossip_step[kDTypes])(const GossipStepArguments&);
  void (*local_step[kDTypes])(const LocalStepArguments&);
  void (*merge[kDTypes])(const MergeArguments&);
};

inline std::vector<RuleEntry>& registry() {
  static std::vector<RuleEntry> entries;
  return entries;
}

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

}  // namespace qgm::cpu
