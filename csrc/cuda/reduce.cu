// Launches the reductions. Apart from the rules, so that rules compile without them.
#include "reduce.h"
#include "reduce_kernels.h"

namespace qgm::cuda {

namespace {

ReduceParameters parameters(const ReduceArguments& a) {
  return {a.rows, a.cols, a.stride, reduce_blocks(a.cols), a.scratch};
}

// Calls f(a null pointer of the storage type), which stands for the type.
template <class F>
void for_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<float16*>(nullptr));
  }
}

template <bool kFinite>
void row_sums(const char* op, DType dtype, const Device& device, const ReduceArguments& a, const ReduceParameters& p) {
  for_storage(dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    launch(op, device, row_block_sums<Storage, kFinite>, p.rows * p.blocks, dim3(kReduceLanes), 0, a.stream,
           static_cast<const Storage*>(a.x), p);
  });
}

// One block a row, all of them started: the kernel does not stride over rows.
template <Finish kFinish, class Out>
void finish(const char* op, int64_t rows, const ReduceArguments& a, const ReduceParameters& p, Out* out) {
  launch_blocks(op, finish_rows<kFinish, Out>, rows, dim3(kReduceLanes), 0, a.stream, p, double(a.rows), out);
}

}  // namespace

void squared_norms(DType dtype, const ReduceArguments& a, double* out) {
  const Device device("squared_norms", a.device);
  const ReduceParameters p = parameters(a);
  row_sums<false>("squared_norms", dtype, device, a, p);
  finish<Finish::kSum>("squared_norms", a.rows, a, p, out);
}

void sum_blocks(double* sums, int64_t rows, int64_t blocks, double* out, int index, cudaStream_t stream) {
  const Device device("sum_blocks", index);
  const ReduceParameters p{rows, 0, 0, blocks, sums};
  launch_blocks("sum_blocks", finish_rows<Finish::kSum, double>, rows, dim3(kReduceLanes), 0, stream, p, 0.0, out);
}

void rows_are_finite(DType dtype, const ReduceArguments& a, bool* out) {
  const Device device("rows_are_finite", a.device);
  const ReduceParameters p = parameters(a);
  row_sums<true>("rows_are_finite", dtype, device, a, p);
  finish<Finish::kFinite>("rows_are_finite", a.rows, a, p, out);
}

void consensus_distance(DType dtype, const ReduceArguments& a, double* out) {
  const Device device("consensus_distance", a.device);
  const ReduceParameters p = parameters(a);
  for_storage(dtype, [&](auto* type) {
    using Storage = std::remove_pointer_t<decltype(type)>;
    using T = Compute<Storage>;
    launch("consensus_distance", device, consensus_block_sums<Storage>, p.blocks, dim3(kReduceLanes), 0, a.stream,
           static_cast<const Storage*>(a.x), p, T(1) / T(a.rows));
  });
  finish<Finish::kDistance>("consensus_distance", 1, a, p, out);
}

}  // namespace qgm::cuda
