// relay_step as Python calls it, for every backend; see binding.h, to which it adds: a Backend has RelayStep (the
// arguments), relay_registry() (a RelayTable of them) and check_relay(arguments).
#pragma once

#include "binding.h"
#include "relay.h"

namespace qgm {

template <class Backend, class... Where>
void bind_relay_step(pybind11::module_& m) {
  m.def("relay_step", [](const std::string& rule, int dtype, Address x, Address g, const std::vector<Address>& state,
                         int64_t rows, int64_t cols, int64_t x_stride, int64_t g_stride, int64_t state_stride,
                         int64_t trees, Address offsets, Address senders, Address reverse, Address message,
                         int64_t message_stride, Address counts, const std::vector<double>& hyper, Where... where) {
    const RelayEntry<typename Backend::RelayStep>* entry = nullptr;
    for (const auto& candidate : Backend::relay_registry()) {
      if (candidate.name == rule) entry = &candidate;
    }
    if (entry == nullptr) throw pybind11::value_error("relay_step_: rule '" + rule + "' can't be relayed");
    expect(*entry, "state vectors", entry->states, state.size());
    expect(*entry, "hyper-parameters", entry->hyper, hyper.size());
    typename Backend::RelayStep a{};
    a.x = pointer(x);
    a.g = pointer(g);
    for (size_t k = 0; k < state.size(); ++k) a.state[k] = pointer(state[k]);
    a.rows = rows;
    a.cols = cols;
    a.x_stride = x_stride;
    a.g_stride = g_stride;
    a.state_stride = state_stride;
    a.hyper = hyper.data();
    a.trees = trees;
    a.offsets = static_cast<const int32_t*>(pointer(offsets));
    a.senders = static_cast<const int32_t*>(pointer(senders));
    a.reverse = static_cast<const int32_t*>(pointer(reverse));
    a.message = pointer(message);
    a.message_stride = message_stride;
    a.counts = pointer(counts);
    Backend::place(a, where...);
    Backend::check_relay(a);
    const pybind11::gil_scoped_release release;
    entry->relay_step[dtype](a);
  });
}

}  // namespace qgm
