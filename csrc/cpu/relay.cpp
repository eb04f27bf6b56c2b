// Compiles the relayed pass for the rules of RelaySGD and RelaySGD/Grad.
#include "relay.h"

namespace qgm::cpu {
namespace {

template <template <class> class RuleOf>
RelayEntry<RelayStepArguments> make_relay_entry() {
  using Rule = RuleOf<float>;
  return {Rule::kName,
          Rule::kHyper,
          Rule::kStates,
          {relay_step<RuleOf, float>, relay_step<RuleOf, double>, relay_step<RuleOf, bfloat16>,
           relay_step<RuleOf, float16>}};
}

template <template <class> class... RuleOf>
RelayTable<RelayStepArguments> entries(RuleList<RuleOf...>) {
  return {make_relay_entry<RuleOf>()...};
}

}  // namespace

const RelayTable<RelayStepArguments>& relay_registry() {
  static const RelayTable<RelayStepArguments> table = entries(RelayedRules{});
  return table;
}

}  // namespace qgm::cpu
