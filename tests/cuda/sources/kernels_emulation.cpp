// Runs the project's kernels and launchers as host code: `kernels_emulation OP SEED`, under sanitizers.
//
// Every result is compared with the CPU backend, which is compiled into this program too. Buffers are exactly as large
// as the op may touch, so AddressSanitizer sees the first byte too many.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "cpu/gossip_step.h"
#include "cpu/process_step.h"
#include "cpu/reduce.h"
#include "cpu/relay_step.h"
#include "cuda/gossip_step.h"
#include "cuda/process_step.h"
#include "cuda/reduce.cu"
#include "cuda/relay_step.h"
#include "rules/dsgd.h"
#include "rules/push_sum.h"
#include "rules/qg_dadam.h"
#include "rules/qg_dsgdm.h"

using namespace qgm;
using cuda_emulation::Buffer;

static uint64_t g_state = 1;
static double uniform() {
  g_state = g_state * 6364136223846793005ull + 1442695040888963407ull;
  return double(int64_t(g_state >> 11)) / double(int64_t(1) << 52) - 1.0;
}

template <class T>
static void fill(Buffer<T>& buffer, int64_t count) {
  for (int64_t k = 0; k < count; ++k) buffer[k] = narrow<T>(Compute<T>(uniform()));
}

template <class T>
static void check(Buffer<T>& left, Buffer<T>& right, int64_t count, const char* what) {
  if (std::memcmp(left.data(), right.data(), size_t(count) * sizeof(T)) == 0) return;
  std::printf("other bits than the CPU: %s\n", what);
  std::exit(2);
}

// A state vector, twice; of a rule with roots, not negative.
template <class Rule, class T>
static void fill_state(Buffer<T>& left, Buffer<T>& right, int64_t count) {
  fill(left, count);
  for (int64_t k = 0; k < count; ++k) {
    if (kHasNorm<Rule> && left[k] < T(0)) left[k] = -left[k];
    right[k] = left[k];
  }
}

static const double kHyper[] = {0.1, 0.9, 0.8, 1e-4, 2.0, 1.0, 0.7, 0.3};

// stride = 0: rows one behind the other; offset: elements in front of the first row.
template <template <class> class RuleOf, class Storage>
static void gossip(MixingForm form, int64_t rows, int64_t cols, int64_t stride, int64_t offset) {
  using T = Compute<Storage>;
  using Rule = RuleOf<T>;
  constexpr int kStates = Rule::kStates;
  const int64_t size = offset + (rows - 1) * stride + cols;
  Buffer<Storage> x(size), g(size), x_cpu(size);
  std::deque<Buffer<T>> state, state_cpu;  // which moves nothing
  fill(x, size), fill(g, size);
  for (int64_t k = 0; k < size; ++k) x_cpu[k] = x[k];
  for (int s = 0; s < kStates; ++s) {
    state.emplace_back(size), state_cpu.emplace_back(size);
    fill_state<Rule>(state.back(), state_cpu.back(), size);
  }
  const int64_t blocks = kHasNorm<Rule> ? reduce_blocks(cols) : 0;
  Buffer<double> sums(rows * blocks), sums_cpu(rows * blocks);
  Buffer<T> lane_sums(rows * blocks * kReduceLanes);
  // a star: one long row, the others short
  std::vector<int32_t> offsets{0}, columns;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rows; ++j) {
      if (i == 0 || j == 0 || j == i) columns.push_back(int32_t(j));
    }
    offsets.push_back(int32_t(columns.size()));
  }
  Buffer<int32_t> row_offsets(rows + 1), column(int64_t(columns.size()));
  Buffer<T> weights(int64_t(columns.size()));
  for (int64_t i = 0; i <= rows; ++i) row_offsets[i] = offsets[size_t(i)];
  for (size_t q = 0; q < columns.size(); ++q) column[q] = columns[q], weights[q] = T(uniform());
  const Mixing mixing{form, row_offsets.data(), column.data(), weights.data(), int64_t(columns.size())};
  Buffer<T> scalars(rows * kRowScalars<RuleOf<T>>);
  for (int64_t k = 0; k < rows * kRowScalars<RuleOf<T>>; ++k) scalars[k] = T(1.5 + 0.5 * uniform());

  cpu::GossipStepArguments a{};
  a.row_scalars = scalars.data();
  a.x = x_cpu.data() + offset, a.g = g.data() + offset;
  for (int s = 0; s < kStates; ++s) a.state[s] = state_cpu[size_t(s)].data() + offset;
  a.block_sums = sums_cpu.data();
  a.rows = rows, a.cols = cols, a.x_stride = a.g_stride = a.state_stride = stride;
  a.mixing = mixing, a.hyper = kHyper, a.threads = 1, a.simd = cpu::Simd::kBaseline;
  cpu::gossip_step<RuleOf, Storage>(a);

  cuda::GossipStepArguments b{};
  static_cast<GossipStepArguments&>(b) = a;
  b.x = x.data() + offset;
  for (int s = 0; s < kStates; ++s) b.state[s] = state[size_t(s)].data() + offset;
  b.block_sums = sums.data(), b.lane_sums = lane_sums.data();
  cuda::gossip_step<RuleOf, Storage>(b);
  check(x, x_cpu, size, "gossip_step x");
  for (size_t s = 0; s < state.size(); ++s) check(state[s], state_cpu[s], size, "gossip_step state");
  check(sums, sums_cpu, rows * blocks, "gossip_step block sums");
}

// Trees in turn a binary tree and a chain; stride and offset as above, for the messages too.
template <template <class> class RuleOf, class Storage>
static void relay(int64_t trees, int64_t rows, int64_t cols, int64_t stride, int64_t offset) {
  using T = Compute<Storage>;
  constexpr int kStates = RuleOf<T>::kStates;
  const int64_t edges = 2 * (rows - 1), size = offset + (rows - 1) * stride + cols;
  const int64_t messages = edges == 0 ? 0 : offset + (edges - 1) * stride + cols;
  Buffer<Storage> x(size), g(size), x_cpu(size);
  Buffer<T> state(size), state_cpu(size), message(messages), message_cpu(messages), counts(trees * rows);
  fill(x, size), fill(g, size), fill(state, size), fill(message, messages), fill(counts, trees * rows);
  for (int64_t k = 0; k < size; ++k) x_cpu[k] = x[k], state_cpu[k] = state[k];
  for (int64_t k = 0; k < messages; ++k) message_cpu[k] = message[k];
  Buffer<int32_t> offsets(trees * (rows + 1)), senders(trees * edges), reverse(trees * edges);
  for (int64_t k = 0; k < trees; ++k) {
    const auto linked = [&](int64_t i, int64_t j) {
      const int64_t child = i > j ? i : j, parent = i > j ? j : i;
      return child != parent && parent == (k % 2 == 0 ? (child - 1) / 2 : child - 1);
    };
    std::vector<int32_t> to, from;
    for (int64_t i = 0; i < rows; ++i) {
      offsets[k * (rows + 1) + i] = int32_t(to.size());
      for (int64_t j = 0; j < rows; ++j) {
        if (linked(i, j)) to.push_back(int32_t(i)), from.push_back(int32_t(j));
      }
    }
    offsets[k * (rows + 1) + rows] = int32_t(to.size());
    for (int64_t e = 0; e < edges; ++e) {
      senders[k * edges + e] = from[size_t(e)];
      for (int64_t f = 0; f < edges; ++f) {
        if (to[size_t(f)] == from[size_t(e)] && from[size_t(f)] == to[size_t(e)]) reverse[k * edges + e] = int32_t(f);
      }
    }
  }

  cpu::RelayStepArguments a{};
  a.x = x_cpu.data() + offset, a.g = g.data() + offset;
  if (kStates > 0) a.state[0] = state_cpu.data() + offset;
  a.rows = rows, a.cols = cols, a.x_stride = a.g_stride = a.state_stride = a.message_stride = stride;
  a.trees = trees, a.offsets = offsets.data(), a.senders = senders.data(), a.reverse = reverse.data();
  a.message = message_cpu.data() + offset, a.counts = counts.data();
  a.hyper = kHyper, a.threads = 1, a.simd = cpu::Simd::kBaseline;
  cpu::relay_step<RuleOf, Storage>(a);

  cuda::RelayStepArguments b{};
  static_cast<GossipStepArguments&>(b) = a;
  static_cast<RelayArguments&>(b) = a;
  b.x = x.data() + offset, b.message = message.data() + offset;
  if (kStates > 0) b.state[0] = state.data() + offset;
  cuda::relay_step<RuleOf, Storage>(b);
  check(x, x_cpu, size, "relay_step x");
  check(state, state_cpu, size, "relay_step state");
  check(message, message_cpu, messages, "relay_step message");
}

template <template <class> class RuleOf, class Storage>
static void process(int64_t size, int64_t terms, bool mean, int64_t offset) {
  using T = Compute<Storage>;
  using Rule = RuleOf<T>;
  constexpr int kStates = Rule::kStates;
  const int64_t whole = size + offset, blocks = kHasNorm<Rule> ? reduce_blocks(size) : 0;
  Buffer<Storage> x(whole), g(whole), x_cpu(whole);
  Buffer<T> message(whole), message_cpu(whole);
  Buffer<double> sums(blocks), sums_cpu(blocks);
  std::deque<Buffer<T>> state, state_cpu;  // which moves nothing
  fill(x, whole), fill(g, whole);
  for (int s = 0; s < kStates; ++s) {
    state.emplace_back(whole), state_cpu.emplace_back(whole);
    fill_state<Rule>(state.back(), state_cpu.back(), whole);
  }
  for (int64_t k = 0; k < whole; ++k) x_cpu[k] = x[k], message[k] = message_cpu[k] = T(0);
  const auto set_states = [&](auto& arguments, std::deque<Buffer<T>>& from) {
    for (int s = 0; s < kStates; ++s) arguments.state[s] = from[size_t(s)].data() + offset;
  };
  Buffer<T> scalars(kRowScalars<RuleOf<T>>);
  for (int64_t k = 0; k < kRowScalars<RuleOf<T>>; ++k) scalars[k] = T(1.5 + 0.5 * uniform());

  cpu::LocalStepArguments a{};
  a.row_scalars = scalars.data();
  a.x = x_cpu.data() + offset, a.g = g.data() + offset;
  set_states(a, state_cpu);
  a.message[0] = message_cpu.data() + offset;
  a.size = size, a.hyper = kHyper, a.threads = 1, a.simd = cpu::Simd::kBaseline;
  cpu::local_step<RuleOf, Storage>(a);
  cuda::LocalStepArguments b{};
  static_cast<LocalStepArguments&>(b) = a;
  b.x = x.data() + offset;
  set_states(b, state);
  b.message[0] = message.data() + offset;
  cuda::local_step<RuleOf, Storage>(b);
  check(message, message_cpu, whole, "local_step message");
  for (size_t s = 0; s < state.size(); ++s) check(state[s], state_cpu[s], whole, "local_step state");

  std::deque<Buffer<T>> received;  // which moves nothing
  std::vector<const void*> pointers;
  std::vector<double> weights;
  for (int64_t q = 0; q < terms; ++q) {
    received.emplace_back(whole);
    fill(received.back(), whole);
    pointers.push_back(received.back().data() + offset);
    weights.push_back(uniform());
  }
  cpu::MergeArguments c{};
  c.row_scalars = scalars.data();
  c.x = x_cpu.data() + offset, c.g = g.data() + offset;
  set_states(c, state_cpu);
  c.received = pointers.data(), c.weights = weights.data(), c.terms = terms, c.mean = mean;
  c.block_sums = sums_cpu.data();
  c.size = size, c.hyper = kHyper, c.threads = 1, c.simd = cpu::Simd::kBaseline;
  cpu::merge<RuleOf, Storage>(c);
  cuda::MergeArguments d{};
  static_cast<MergeArguments&>(d) = c;
  d.x = x.data() + offset, d.block_sums = sums.data();
  set_states(d, state);
  cuda::merge<RuleOf, Storage>(d);
  check(x, x_cpu, whole, "merge x");
  for (size_t s = 0; s < state.size(); ++s) check(state[s], state_cpu[s], whole, "merge state");
  check(sums, sums_cpu, blocks, "merge block sums");
}

template <class Storage>
static void reductions(DType dtype, int64_t rows, int64_t cols) {
  const int64_t blocks = (cols + kReduceBlock - 1) / kReduceBlock;
  Buffer<Storage> x(rows * cols);
  Buffer<double> out(rows), out_cpu(rows), scratch(rows * blocks);
  Buffer<uint8_t> finite_cpu(rows);
  Buffer<bool> finite(rows);
  fill(x, rows * cols);
  const ReduceArguments common{x.data(), rows, cols, cols};
  const cpu::ReduceArguments a{common, 1, cpu::Simd::kBaseline};
  const cuda::ReduceArguments b{common, scratch.data(), 0, nullptr};
  cpu::squared_norms<Storage>(a, out_cpu.data());
  cuda::squared_norms(dtype, b, out.data());
  check(out, out_cpu, rows, "squared_norms");
  cpu::consensus_distance<Storage>(a, out_cpu.data());
  cuda::consensus_distance(dtype, b, out.data());
  check(out, out_cpu, 1, "consensus_distance");
  cpu::rows_are_finite<Storage>(a, finite_cpu.data());
  cuda::rows_are_finite(dtype, b, finite.data());
  for (int64_t i = 0; i < rows; ++i) {
    if (finite[i] != (finite_cpu[i] != 0)) std::exit(2);
  }
}

int main(int count, char** arguments) {
  if (count != 3) return 3;
  const auto is = [&](const char* op) { return std::strcmp(arguments[1], op) == 0; };
  cuda_emulation::Options& options = cuda::emulation_options();
  options.seed = unsigned(std::atoi(arguments[2]));
  options.unordered_blocks = !is("reductions") && !is("norm");  // those have static shared memory
  if (is("tile")) {
    for (const MixingForm form : {MixingForm::kSparse, MixingForm::kMean, MixingForm::kIdentity}) {
      gossip<rules::qg_dsgdm::QgDsgdmN, float>(form, 5, 301, 304, 0);
      gossip<rules::qg_dsgdm::QgDsgdmMultistep, bfloat16>(form, 9, 70, 72, 3);
      gossip<rules::dsgd::Dsgd, double>(form, 3, 129, 130, 1);
      gossip<rules::push_sum::QgSgp, float>(form, 7, 70, 72, 0);
    }
  } else if (is("norm")) {  // in strips, then with the vector read once more
    gossip<rules::qg_dadam::QgDadam, float>(MixingForm::kSparse, 33, 4101, 4104, 0);
    gossip<rules::qg_dadam::QgDadam, bfloat16>(MixingForm::kMean, 5, 300, 304, 0);
    process<rules::qg_dadam::QgDadam, float>(4101, 3, false, 0);
    process<rules::qg_dadam::QgDadamV1, bfloat16>(300, 2, true, 1);
  } else if (is("columns")) {
    for (const MixingForm form : {MixingForm::kSparse, MixingForm::kMean, MixingForm::kIdentity}) {
      gossip<rules::qg_dsgdm::QgDsgdmN, float>(form, 4, 71, 73, 0);
      gossip<rules::qg_dsgdm::QgDsgdm, float16>(form, 18, 40, 41, 0);
      gossip<rules::push_sum::Sgp, float>(form, 5, 33, 35, 0);
    }
  } else if (is("relay")) {
    relay<rules::dsgd::DsgdmN, float>(2, 5, 301, 304, 0);
    relay<rules::relay::RelayGradM, bfloat16>(1, 33, 40, 44, 3);
    relay<rules::relay::RelayGrad, float16>(3, 9, 71, 73, 0);
    relay<rules::dsgd::Dsgd, double>(1, 1, 9, 9, 0);
  } else if (is("process")) {
    process<rules::qg_dsgdm::QgDsgdmN, float>(777, 3, false, 0);
    process<rules::dsgd::DsgdmN, float16>(130, 5, true, 1);
    process<rules::dsgd::Dsgd, double>(1, 1, false, 0);
    process<rules::push_sum::QgSgp, float>(300, 3, false, 0);
  } else if (is("reductions")) {
    reductions<float>(DType::kFloat32, 2, 4099);
    reductions<bfloat16>(DType::kBFloat16, 3, 300);
  } else {
    return 3;
  }
  std::puts("right");
  return 0;
}
