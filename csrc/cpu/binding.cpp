// Python binding of the CPU kernels: module qgm_ext._cpu. Pointers and sizes come in as integers,
// checked by qgm_ext/ops.py, the only caller; no torch header is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "reduce.h"
#include "registry.h"

namespace py = pybind11;
using namespace qgm::cpu;

namespace {

Simd g_simd = best_simd();

const char* const kSimdNames[] = {"baseline", "avx2", "avx512"};

void set_simd_level(const std::string& name) {
  for (int level = 0; level <= int(best_simd()); ++level) {
    if (name == kSimdNames[level]) {
      g_simd = Simd(level);
      return;
    }
  }
  throw py::value_error("set_simd_level: this processor has no level '" + name + "', the best is '" +
                        kSimdNames[int(best_simd())] + "'");
}

const RuleEntry& entry(int rule) { return registry().at(size_t(rule)); }

template <class Count>
void expect(const RuleEntry& rule, const char* what, Count expected, size_t got) {
  if (size_t(expected) != got) {
    throw py::value_error("rule " + rule.name + " takes " + std::to_string(expected) + " " + what + ", got " +
                          std::to_string(got));
  }
}

// A damaged mixing matrix must not become a read out of bounds.
void check_mixing(const qgm::Mixing& mixing, int64_t rows, int64_t entries) {
  if (mixing.form != qgm::MixingForm::kSparse) return;
  if (mixing.row_offsets[0] != 0 || mixing.row_offsets[rows] != entries) {
    throw py::value_error("gossip_step_: row_offsets of the mixing matrix end at " +
                          std::to_string(mixing.row_offsets[rows]) + ", but it has " + std::to_string(entries) +
                          " entries");
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = mixing.row_offsets[i], end = mixing.row_offsets[i + 1];
    if (begin >= end) throw py::value_error("gossip_step_: row " + std::to_string(i) + " of the mixing matrix is empty");
    for (int64_t q = begin; q < end; ++q) {
      if (mixing.columns[q] < 0 || mixing.columns[q] >= rows) {
        throw py::value_error("gossip_step_: row " + std::to_string(i) + " of the mixing matrix names worker " +
                              std::to_string(mixing.columns[q]) + ", there are " + std::to_string(rows));
      }
    }
  }
}

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void py_gossip_step(int rule, int dtype, Address x, Address g, const std::vector<Address>& state, int64_t rows,
                    int64_t cols, int64_t x_stride, int64_t g_stride, int64_t state_stride, int form,
                    Address row_offsets, Address columns, Address weights, int64_t entries, const std::vector<double>& hyper,
                    int threads) {
  const RuleEntry& r = entry(rule);
  expect(r, "state vectors", r.states, state.size());
  expect(r, "hyper-parameters", r.hyper, hyper.size());
  GossipStepArguments a{};
  a.x = pointer(x);
  a.g = pointer(g);
  for (size_t k = 0; k < state.size(); ++k) a.state[k] = pointer(state[k]);
  a.rows = rows;
  a.cols = cols;
  a.x_stride = x_stride;
  a.g_stride = g_stride;
  a.state_stride = state_stride;
  a.mixing = {qgm::MixingForm(form), static_cast<const int32_t*>(pointer(row_offsets)),
              static_cast<const int32_t*>(pointer(columns)), pointer(weights)};
  check_mixing(a.mixing, rows, entries);
  a.hyper = hyper.data();
  a.threads = threads;
  a.simd = g_simd;
  const py::gil_scoped_release release;
  r.gossip_step[dtype](a);
}

void py_local_step(int rule, int dtype, Address x, Address g, const std::vector<Address>& state,
                   const std::vector<Address>& message, int64_t size, const std::vector<double>& hyper,
                   int threads) {
  const RuleEntry& r = entry(rule);
  expect(r, "state vectors", r.states, state.size());
  expect(r, "messages", r.messages, message.size());
  expect(r, "hyper-parameters", r.hyper, hyper.size());
  LocalStepArguments a{};
  a.x = pointer(x);
  a.g = pointer(g);
  for (size_t k = 0; k < state.size(); ++k) a.state[k] = pointer(state[k]);
  for (size_t k = 0; k < message.size(); ++k) a.message[k] = pointer(message[k]);
  a.size = size;
  a.hyper = hyper.data();
  a.threads = threads;
  a.simd = g_simd;
  const py::gil_scoped_release release;
  r.local_step[dtype](a);
}

void py_merge(int rule, int dtype, Address x, Address g, const std::vector<Address>& state,
              const std::vector<Address>& received, const std::vector<double>& weights, bool mean, int64_t size,
              const std::vector<double>& hyper, int threads) {
  const RuleEntry& r = entry(rule);
  expect(r, "state vectors", r.states, state.size());
  expect(r, "hyper-parameters", r.hyper, hyper.size());
  expect(r, "messages from all workers together", r.messages * weights.size(), received.size());
  std::vector<const void*> pointers(received.size());
  for (size_t q = 0; q < received.size(); ++q) pointers[q] = pointer(received[q]);
  MergeArguments a{};
  a.x = pointer(x);
  a.g = pointer(g);
  for (size_t k = 0; k < state.size(); ++k) a.state[k] = pointer(state[k]);
  a.received = pointers.data();
  a.weights = weights.data();
  a.terms = int64_t(weights.size());
  a.mean = mean;
  a.size = size;
  a.hyper = hyper.data();
  a.threads = threads;
  a.simd = g_simd;
  const py::gil_scoped_release release;
  r.merge[dtype](a);
}

// One reduction for each storage type, in the order of DType.
template <class Out>
using Reduction = void (*)(const ReduceArguments&, Out*);

template <class Out>
void reduce(const Reduction<Out> (&kernels)[kDTypes], int dtype, Address x, int64_t rows, int64_t cols,
            int64_t stride, Address out, int threads) {
  const ReduceArguments a{pointer(x), rows, cols, stride, threads, g_simd};
  const py::gil_scoped_release release;
  kernels[dtype](a, static_cast<Out*>(pointer(out)));
}

void py_squared_norms(int dtype, Address x, int64_t rows, int64_t cols, int64_t stride, Address out, int threads) {
  static const Reduction<double> kernels[] = {squared_norms<float>, squared_norms<double>,
                                              squared_norms<qgm::bfloat16>, squared_norms<qgm::float16>};
  reduce(kernels, dtype, x, rows, cols, stride, out, threads);
}

void py_consensus_distance(int dtype, Address x, int64_t rows, int64_t cols, int64_t stride, Address out,
                           int threads) {
  static const Reduction<double> kernels[] = {consensus_distance<float>, consensus_distance<double>,
                                              consensus_distance<qgm::bfloat16>, consensus_distance<qgm::float16>};
  reduce(kernels, dtype, x, rows, cols, stride, out, threads);
}

void py_rows_are_finite(int dtype, Address x, int64_t rows, int64_t cols, int64_t stride, Address out,
                        int threads) {
  static const Reduction<uint8_t> kernels[] = {rows_are_finite<float>, rows_are_finite<double>,
                                               rows_are_finite<qgm::bfloat16>, rows_are_finite<qgm::float16>};
  reduce(kernels, dtype, x, rows, cols, stride, out, threads);
}

py::list rules() {
  py::list out;
  for (const RuleEntry& r : registry()) {
    py::dict d;
    d["name"] = r.name;
    d["hyper"] = r.hyper;
    d["states"] = r.states;
    d["messages"] = r.messages;
    d["merge_reads_x"] = r.merge_reads_x;
    d["merge_reads_grad"] = r.merge_reads_grad;
    out.append(d);
  }
  return out;
}

py::dict build_info() {
  py::dict d;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  d["threads"] = "OpenMP " + std::to_string(_OPENMP);
#else
  d["threads"] = "none (built without OpenMP)";
#endif
  d["simd_best"] = kSimdNames[int(best_simd())];
  return d;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of qgm_ext; use them through qgm_ext.ops.";
  m.def("gossip_step", &py_gossip_step);
  m.def("local_step", &py_local_step);
  m.def("merge", &py_merge);
  m.def("squared_norms", &py_squared_norms);
  m.def("consensus_distance", &py_consensus_distance);
  m.def("rows_are_finite", &py_rows_are_finite);
  m.def("rules", &rules, "The compiled rules, in registry order: list of dicts.");
  m.def("build_info", &build_info);
  m.def("simd_level", [] { return kSimdNames[int(g_simd)]; });
  m.def("set_simd_level", &set_simd_level, "Use another SIMD level of this processor; for tests of equal bits.");
}
