// The table of compiled rules, as the binding sees it: what each needs, and its launchers by storage type.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace qgm::cuda {

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

}  // namespace qgm::cuda
