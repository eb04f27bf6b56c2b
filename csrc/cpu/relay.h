// The rules that can be relayed over trees, by name. They are compiled in relay.cpp.
#pragma once

#include "relay_step.h"

namespace qgm::cpu {

const RelayTable<RelayStepArguments>& relay_registry();

}  // namespace qgm::cpu
