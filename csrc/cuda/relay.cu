// Compiles the relayed pass for the rules of RelaySGD and RelaySGD/Grad, and enters them in the table.
#include "relay_step.h"

namespace qgm::cuda {
namespace {

template <template <class> class RuleOf>
bool register_relayed() {
  using Rule = RuleOf<float>;
  relay_registry().push_back({Rule::kName,
                              Rule::kHyper,
                              Rule::kStates,
                              {relay_step<RuleOf, float>, relay_step<RuleOf, double>, relay_step<RuleOf, bfloat16>,
                               relay_step<RuleOf, float16>}});
  return true;
}

template <template <class> class... RuleOf>
bool register_all(RuleList<RuleOf...>) {
  return (register_relayed<RuleOf>() && ...);
}

[[maybe_unused]] const bool registered = register_all(RelayedRules{});

}  // namespace
}  // namespace qgm::cuda
