// Python binding of the CPU kernels: module qgm_ext._cpu. Pointers and sizes come in as integers,
// checked by qgm_ext/_ops.py, the only caller; no torch header is needed.
#include "../binding.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../relay_binding.h"
#include "plain_loop.h"
#include "reduce.h"
#include "registry.h"
#include "relay.h"

namespace py = pybind11;
using namespace qgm::cpu;
using qgm::Address;
using qgm::kDTypes;
using qgm::pointer;

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

struct Backend {
  using GossipStep = GossipStepArguments;
  using LocalStep = LocalStepArguments;
  using Merge = MergeArguments;
  using RelayStep = RelayStepArguments;

  static const std::vector<RuleEntry>& registry() { return qgm::cpu::registry(); }
  static const auto& relay_registry() { return qgm::cpu::relay_registry(); }

  template <class Arguments>
  static void place(Arguments& a, int threads) {
    a.threads = threads;
    a.simd = g_simd;
  }

  // A damaged mixing matrix must not become a read out of bounds.
  static void check_mixing(const qgm::Mixing& mixing, int64_t rows) {
    if (mixing.form != qgm::MixingForm::kSparse) return;
    if (mixing.row_offsets[0] != 0 || mixing.row_offsets[rows] != mixing.nnz) {
      throw py::value_error("gossip_step_: row_offsets of the mixing matrix end at " +
                            std::to_string(mixing.row_offsets[rows]) + ", but it has " + std::to_string(mixing.nnz) +
                            " entries");
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t begin = mixing.row_offsets[i], end = mixing.row_offsets[i + 1];
      if (begin >= end) {
        throw py::value_error("gossip_step_: row " + std::to_string(i) + " of the mixing matrix is empty");
      }
      for (int64_t q = begin; q < end; ++q) {
        if (mixing.columns[q] < 0 || mixing.columns[q] >= rows) {
          throw py::value_error("gossip_step_: row " + std::to_string(i) + " of the mixing matrix names worker " +
                                std::to_string(mixing.columns[q]) + ", there are " + std::to_string(rows));
        }
      }
    }
  }

  // Nor may damaged trees.
  static void check_relay(const RelayStepArguments& a) {
    const auto refuse = [](const std::string& what) {
      throw py::value_error("relay_step_: the trees are damaged: " + what);
    };
    for (int64_t k = 0; k < a.trees; ++k) {
      const int32_t* const offsets = a.offsets + k * (a.rows + 1);
      if (offsets[0] != 0 || offsets[a.rows] != a.edges()) refuse("their offsets don't end at 2 (n - 1)");
      for (int64_t i = 0; i < a.rows; ++i) {
        if (offsets[i] > offsets[i + 1]) refuse("their offsets fall");
      }
      for (int64_t e = 0; e < a.edges(); ++e) {
        const int32_t sender = a.senders[k * a.edges() + e], back = a.reverse[k * a.edges() + e];
        if (sender < 0 || sender >= a.rows || back < 0 || back >= a.edges()) refuse("an edge is out of range");
      }
    }
  }
};

using Binding = qgm::Binding<Backend, int>;

// One reduction for each storage type, in the order of DType.
template <class Out>
using Reduction = void (*)(const ReduceArguments&, Out*);

template <class Out>
void reduce(const Reduction<Out> (&kernels)[kDTypes], int dtype, Address x, int64_t rows, int64_t cols, int64_t stride,
            Address out, int threads) {
  const ReduceArguments a{{pointer(x), rows, cols, stride}, threads, g_simd};
  const py::gil_scoped_release release;
  kernels[dtype](a, static_cast<Out*>(pointer(out)));
}

void py_squared_norms(int dtype, Address x, int64_t rows, int64_t cols, int64_t stride, Address out, int threads) {
  static const Reduction<double> kernels[] = {squared_norms<float>, squared_norms<double>, squared_norms<qgm::bfloat16>,
                                              squared_norms<qgm::float16>};
  reduce(kernels, dtype, x, rows, cols, stride, out, threads);
}

void py_sum_blocks(Address sums, int64_t rows, int64_t blocks, Address out, int /* threads: not worth one */) {
  sum_blocks(static_cast<const double*>(pointer(sums)), rows, blocks, static_cast<double*>(pointer(out)));
}

void py_consensus_distance(int dtype, Address x, int64_t rows, int64_t cols, int64_t stride, Address out, int threads) {
  static const Reduction<double> kernels[] = {consensus_distance<float>, consensus_distance<double>,
                                              consensus_distance<qgm::bfloat16>, consensus_distance<qgm::float16>};
  reduce(kernels, dtype, x, rows, cols, stride, out, threads);
}

void py_rows_are_finite(int dtype, Address x, int64_t rows, int64_t cols, int64_t stride, Address out, int threads) {
  static const Reduction<uint8_t> kernels[] = {rows_are_finite<float>, rows_are_finite<double>,
                                               rows_are_finite<qgm::bfloat16>, rows_are_finite<qgm::float16>};
  reduce(kernels, dtype, x, rows, cols, stride, out, threads);
}

void plain_loop(Address x, Address g, Address m, int64_t size) {
  const py::gil_scoped_release release;
  SimdLevels<PlainLoop, float*, const float*, float*, int64_t>::run(g_simd, static_cast<float*>(pointer(x)),
                                                                    static_cast<const float*>(pointer(g)),
                                                                    static_cast<float*>(pointer(m)), size);
}

struct Streams {
  std::vector<float*> arrays;
  int writes;
  int64_t rows, cols, width;
};

template <int kReads, int kWrites>
void plain_streams(const Streams& s) {
  SimdLevels<PlainStreams<kReads, kWrites>, float* const*, int64_t, int64_t, int64_t>::run(g_simd, s.arrays.data(),
                                                                                           s.rows, s.cols, s.width);
}

template <int kReads, int... kWrites>
void choose_writes(const Streams& s, std::integer_sequence<int, kWrites...>) {
  ((kWrites + 1 == s.writes ? plain_streams<kReads, (kWrites < kReads ? kWrites + 1 : kReads)>(s) : void()), ...);
}

template <int... kReads>
void choose_reads(const Streams& s, std::integer_sequence<int, kReads...>) {
  ((kReads + 1 == int(s.arrays.size()) ? choose_writes<kReads + 1>(s, std::make_integer_sequence<int, kMaxStreams>{})
                                       : void()),
   ...);
}

void py_plain_streams(const std::vector<Address>& arrays, int writes, int64_t rows, int64_t cols, int64_t width) {
  const int reads = int(arrays.size());
  if (reads < 1 || reads > kMaxStreams || writes < 1 || writes > reads) {
    throw py::value_error("plain_streams takes 1 to 8 arrays and writes 1 to all of them");
  }
  if (rows < 1 || cols < 1 || width < 1) throw py::value_error("rows, cols and width must be at least 1");
  Streams streams{{}, writes, rows, cols, width};
  for (const Address array : arrays) streams.arrays.push_back(static_cast<float*>(pointer(array)));
  const py::gil_scoped_release release;
  choose_reads(streams, std::make_integer_sequence<int, kMaxStreams>{});
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
  Binding::define(m);
  qgm::bind_relay_step<Backend, int>(m);
  m.def("plain_streams", &py_plain_streams, py::arg("arrays"), py::arg("writes"), py::arg("rows"), py::arg("cols"),
        py::arg("width"),
        "For benchmarks: reads float32 [rows, cols] arrays and writes the first of them, `width` columns at a time.");
  m.attr("tile_width") = kTileWidth;
  m.def("squared_norms", &py_squared_norms);
  m.def("sum_blocks", &py_sum_blocks);
  m.def("consensus_distance", &py_consensus_distance);
  m.def("rows_are_finite", &py_rows_are_finite);
  m.def("plain_loop", &plain_loop, "float32 arrays of `size`: reads x, g, m and writes x, m; a yardstick.");
  m.def("build_info", &build_info);
  m.def("simd_level", [] { return kSimdNames[int(g_simd)]; });
  m.def(
      "set_elements_per_thread",
      [](int64_t elements) { return std::exchange(qgm::cpu::g_elements_per_thread, std::max<int64_t>(1, elements)); },
      "Work below which no second thread is used; returns the value before. For tests of threads.");
  m.def("set_simd_level", &set_simd_level, "Use another SIMD level of this processor; for tests of equal bits.");
}
