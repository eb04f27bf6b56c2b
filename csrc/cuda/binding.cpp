// Python binding of the CUDA kernels: module qgm_ext._cuda. As csrc/cpu/binding.cpp, but a call ends
// with device and stream. Importing it needs no driver; using it without one says what is missing.
#include "../binding.h"

#include <string>
#include <vector>

#include "../relay_binding.h"
#include "reduce.h"
#include "relay.h"
#include "table.h"

namespace py = pybind11;
using namespace qgm::cuda;
using qgm::Address;
using qgm::DType;
using qgm::pointer;

namespace {

struct Backend {
  using GossipStep = GossipStepArguments;
  using LocalStep = LocalStepArguments;
  using Merge = MergeArguments;
  using RelayStep = RelayStepArguments;

  static const std::vector<RuleEntry>& registry() { return qgm::cuda::registry(); }
  static const auto& relay_registry() { return qgm::cuda::relay_registry(); }

  template <class Arguments>
  static void place(Arguments& a, int device, Address stream) {
    a.device = device;
    a.stream = static_cast<cudaStream_t>(pointer(stream));
  }

  // The matrix lies on the device: qgm_ext.mixing.Mixing has checked it, and looking would mean waiting.
  static void check_mixing(const qgm::Mixing&, int64_t) {}

  // Nor for trees, which qgm_ext.trees.Trees makes.
  static void check_relay(const RelayStepArguments&) {}
};

template <class Out>
void reduce(void (*kernel)(DType, const ReduceArguments&, Out*), int dtype, Address x, int64_t rows, int64_t cols,
            int64_t stride, Address out, Address scratch, int device, Address stream) {
  const ReduceArguments a{{pointer(x), rows, cols, stride},
                          static_cast<double*>(pointer(scratch)),
                          device,
                          static_cast<cudaStream_t>(pointer(stream))};
  const py::gil_scoped_release release;
  kernel(DType(dtype), a, static_cast<Out*>(pointer(out)));
}

template <auto kKernel>
void define_reduction(py::module_& m, const char* name) {
  m.def(name,
        [](int dtype, Address x, int64_t rows, int64_t cols, int64_t stride, Address out, Address scratch, int device,
           Address stream) { reduce(kKernel, dtype, x, rows, cols, stride, out, scratch, device, stream); });
}

py::dict build_info() {
  py::dict d;
  d["runtime"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return d;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of qgm_ext; use them through qgm_ext.ops.";
  qgm::Binding<Backend, int, Address>::define(m);
  qgm::bind_relay_step<Backend, int, Address>(m);
  define_reduction<&squared_norms>(m, "squared_norms");
  define_reduction<&consensus_distance>(m, "consensus_distance");
  define_reduction<&rows_are_finite>(m, "rows_are_finite");
  m.def("sum_blocks", [](Address sums, int64_t rows, int64_t blocks, Address out, int device, Address stream) {
    sum_blocks(static_cast<double*>(pointer(sums)), rows, blocks, static_cast<double*>(pointer(out)), device,
               static_cast<cudaStream_t>(pointer(stream)));
  });
  m.def("build_info", &build_info);
}
