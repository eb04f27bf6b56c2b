// What the Python bindings of all backends share: from integers to arguments, and the checks that keep
// a wrong call from becoming a wild read. qgm_ext/_ops.py, the only caller, has checked all else.
//
// A Backend has: registry(), a vector of entries (name, hyper, states, messages, row_scalars, merge_reads_x,
// merge_reads_grad, norm_state, and gossip_step, local_step, merge by dtype); the types GossipStep, LocalStep,
// Merge, derived from the structs of arguments.h; place(arguments, where...), which fills in what the
// derived type adds; check_mixing(mixing, rows, nnz).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "arguments.h"

namespace qgm {

using Address = uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

template <class Entry, class Count>
void expect(const Entry& rule, const char* what, Count expected, size_t got) {
  if (size_t(expected) != got) {
    throw pybind11::value_error("rule " + rule.name + " takes " + std::to_string(expected) + " " + what + ", got " +
                                std::to_string(got));
  }
}

template <class Backend, class... Where>
struct Binding {
  static const auto& entry(int rule) { return Backend::registry().at(size_t(rule)); }

  template <class Entry>
  static void set_states(const Entry& r, const std::vector<Address>& state, void** out) {
    expect(r, "state vectors", r.states, state.size());
    for (size_t k = 0; k < state.size(); ++k) out[k] = pointer(state[k]);
  }

  static void gossip_step(int rule, int dtype, Address x, Address g, const std::vector<Address>& state, int64_t rows,
                          int64_t cols, int64_t x_stride, int64_t g_stride, int64_t state_stride, int form,
                          Address row_offsets, Address columns, Address weights, int64_t nnz,
                          const std::vector<double>& hyper, Address row_scalars, Address block_sums, Address lane_sums,
                          Where... where) {
    const auto& r = entry(rule);
    typename Backend::GossipStep a{};
    a.x = pointer(x);
    a.g = pointer(g);
    set_states(r, state, a.state);
    expect(r, "hyper-parameters", r.hyper, hyper.size());
    a.rows = rows;
    a.cols = cols;
    a.x_stride = x_stride;
    a.g_stride = g_stride;
    a.state_stride = state_stride;
    a.mixing = {MixingForm(form), static_cast<const int32_t*>(pointer(row_offsets)),
                static_cast<const int32_t*>(pointer(columns)), pointer(weights), nnz};
    Backend::check_mixing(a.mixing, rows);
    a.hyper = hyper.data();
    a.row_scalars = pointer(row_scalars);
    a.block_sums = static_cast<double*>(pointer(block_sums));
    a.lane_sums = pointer(lane_sums);
    Backend::place(a, where...);
    const pybind11::gil_scoped_release release;
    r.gossip_step[dtype](a);
  }

  static void local_step(int rule, int dtype, Address x, Address g, const std::vector<Address>& state,
                         const std::vector<Address>& message, int64_t size, const std::vector<double>& hyper,
                         Address row_scalars, Where... where) {
    const auto& r = entry(rule);
    typename Backend::LocalStep a{};
    a.x = pointer(x);
    a.g = pointer(g);
    set_states(r, state, a.state);
    expect(r, "messages", r.messages, message.size());
    expect(r, "hyper-parameters", r.hyper, hyper.size());
    for (size_t k = 0; k < message.size(); ++k) a.message[k] = pointer(message[k]);
    a.size = size;
    a.hyper = hyper.data();
    a.row_scalars = pointer(row_scalars);
    Backend::place(a, where...);
    const pybind11::gil_scoped_release release;
    r.local_step[dtype](a);
  }

  static void merge(int rule, int dtype, Address x, Address g, const std::vector<Address>& state,
                    const std::vector<Address>& received, const std::vector<double>& weights, bool mean, int64_t size,
                    const std::vector<double>& hyper, Address row_scalars, Address block_sums, Where... where) {
    const auto& r = entry(rule);
    typename Backend::Merge a{};
    a.x = pointer(x);
    a.g = pointer(g);
    set_states(r, state, a.state);
    expect(r, "hyper-parameters", r.hyper, hyper.size());
    expect(r, "messages from all workers together", r.messages * weights.size(), received.size());
    std::vector<const void*> pointers(received.size());
    for (size_t q = 0; q < received.size(); ++q) pointers[q] = pointer(received[q]);
    a.received = pointers.data();
    a.weights = weights.data();
    a.terms = int64_t(weights.size());
    a.mean = mean;
    a.size = size;
    a.hyper = hyper.data();
    a.row_scalars = pointer(row_scalars);
    a.block_sums = static_cast<double*>(pointer(block_sums));
    Backend::place(a, where...);
    const pybind11::gil_scoped_release release;
    r.merge[dtype](a);
  }

  static pybind11::list rules() {
    pybind11::list out;
    for (const auto& r : Backend::registry()) {
      pybind11::dict d;
      d["name"] = r.name;
      d["hyper"] = r.hyper;
      d["states"] = r.states;
      d["messages"] = r.messages;
      d["row_scalars"] = r.row_scalars;
      d["merge_reads_x"] = r.merge_reads_x;
      d["merge_reads_grad"] = r.merge_reads_grad;
      d["norm_state"] = r.norm_state;
      out.append(d);
    }
    return out;
  }

  static void define(pybind11::module_& m) {
    m.def("gossip_step", &gossip_step);
    m.def("local_step", &local_step);
    m.def("merge", &merge);
    m.def("rules", &rules, "The compiled rules, in registry order: list of dicts.");
    m.attr("REDUCE_BLOCK") = kReduceBlock;
  }
};

}  // namespace qgm
