// Compiles the relayed pass for the rules of dsgd.h (RelaySGD) and relay.h (RelaySGD/Grad).
#include "relay.h"

#include "../rules/dsgd.h"
#include "../rules/relay.h"

namespace qgm::cpu {
namespace {

template <template <class> class RuleOf>
RelayEntry make_relay_entry() {
  using Rule = RuleOf<float>;
  return {Rule::kName,
          Rule::kHyper,
          Rule::kStates,
          {relay_step<RuleOf, float>, relay_step<RuleOf, double>, relay_step<RuleOf, bfloat16>,
           relay_step<RuleOf, float16>}};
}

template <template <class> class... RuleOf>
std::vector<RelayEntry> entries(RuleList<RuleOf...>) {
  return {make_relay_entry<RuleOf>()...};
}

}  // namespace

const std::vector<RelayEntry>& relay_registry() {
  using namespace rules;
  static const std::vector<RelayEntry> table = entries(
      RuleList<dsgd::Dsgd, dsgd::Dsgdm, dsgd::DsgdmN, relay::RelayGrad, relay::RelayGradM, relay::RelayGradMN>{});
  return table;
}

}  // namespace qgm::cpu
