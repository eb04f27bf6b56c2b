// The rules that can be relayed over trees, by name. They are compiled in relay.cpp.
#pragma once

#include <string>
#include <vector>

#include "relay_step.h"

namespace qgm::cpu {

struct RelayEntry {
  std::string name;
  int hyper, states;
  void (*relay_step[kDTypes])(const RelayStepArguments&);
};

const std::vector<RelayEntry>& relay_registry();

}  // namespace qgm::cpu
