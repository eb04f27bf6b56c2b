// RelaySum whatever the device: its arguments, the rules that can be relayed, and their table. The sums
// themselves are in cpu/relay_step.h, which says what they are, and in cuda/relay_step.h.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"
#include "rules/dsgd.h"
#include "rules/relay.h"

namespace qgm {

// What a relayed step takes besides the arguments of a gossip step, whose mixing matrix it leaves alone. The edges of
// K trees of n workers are in both directions, 2 (n - 1) of them, those into a worker together, ascending by sender.
struct RelayArguments {
  int64_t trees;
  const int32_t* offsets;  // [trees, n + 1]: where the edges into a worker begin
  const int32_t* senders;  // [trees, edges]
  const int32_t* reverse;  // [trees, edges]: the edge in the other direction
  void* message;           // [edges, cols], compute type
  int64_t message_stride;
  const void* counts;  // [trees, n], compute type
};

// RelaySGD takes the rules of dsgd.h, RelaySGD/Grad those of relay.h.
using RelayedRules = RuleList<rules::dsgd::Dsgd, rules::dsgd::Dsgdm, rules::dsgd::DsgdmN, rules::relay::RelayGrad,
                              rules::relay::RelayGradM, rules::relay::RelayGradMN>;

template <class Arguments>
struct RelayEntry {
  std::string name;
  int hyper, states;
  void (*relay_step[kDTypes])(const Arguments&);
};

template <class Arguments>
using RelayTable = std::vector<RelayEntry<Arguments>>;

}  // namespace qgm
