// The rules that can be relayed over trees, by name, as the binding sees them. They are compiled in relay.cu.
#pragma once

#include "../relay.h"
#include "arguments.h"

namespace qgm::cuda {

struct RelayStepArguments : GossipStepArguments, RelayArguments {
  int64_t edges() const { return 2 * (rows - 1); }
};

inline RelayTable<RelayStepArguments>& relay_registry() {
  static RelayTable<RelayStepArguments> table;
  return table;
}

}  // namespace qgm::cuda
