// Runs every compiled rule on exactly sized heap buffers: for the sanitizers (tests/test_sanitizers.py).
//
// The fused pass and the split pair must give the same bits, guard values around every row must
// survive, and AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer must stay silent.
// The test harness puts the registration of all rules in front of this file.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/reduce.h"
#include "cpu/registry.h"

using namespace qgm::cpu;
using qgm::bfloat16;
using qgm::Compute;
using qgm::float16;
using qgm::kReduceBlock;
using qgm::MixingForm;
using qgm::narrow;
using qgm::reduce_blocks;
using qgm::widen;

namespace {

int g_failures = 0;

void check(bool good, const char* what, const RuleEntry& rule, int64_t n, int64_t dim) {
  if (good) return;
  std::printf("FAILED: %s, rule %s, n=%ld, D=%ld\n", what, rule.name.c_str(), long(n), long(dim));
  ++g_failures;
}

template <class T>
T sample(int64_t i) {
  return narrow<T>(Compute<T>(std::sin(double(i) * 0.7) * 2.0));
}

// A matrix [rows, cols] with a guard value after every row, in a buffer of exactly that size.
template <class T>
struct Matrix {
  int64_t rows, cols;
  std::vector<T> data;

  Matrix(int64_t r, int64_t c, int64_t seed) : rows(r), cols(c), data(size_t(r * (c + 1))) {
    for (size_t i = 0; i < data.size(); ++i) data[i] = sample<T>(int64_t(i) + seed);
    for (int64_t i = 0; i < rows; ++i) row(i)[cols] = narrow<T>(Compute<T>(7));
  }
  T* row(int64_t i) { return data.data() + i * (cols + 1); }
  int64_t stride() const { return cols + 1; }
  bool guarded() {
    for (int64_t i = 0; i < rows; ++i) {
      if (widen(row(i)[cols]) != Compute<T>(7)) return false;
    }
    return true;
  }
};

template <class T>
bool same_bits(const Matrix<T>& a, const Matrix<T>& b) {
  return std::memcmp(a.data.data(), b.data.data(), a.data.size() * sizeof(T)) == 0;
}

template <class T>
struct Ring {
  std::vector<int32_t> offsets{0}, columns;
  std::vector<T> weights;
  std::vector<double> wide;

  explicit Ring(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t distance = (i - j + n) % n;
        if (distance > 1 && distance != n - 1) continue;
        columns.push_back(int32_t(j));
        wide.push_back(1.0 / double(std::min<int64_t>(n, 3)));
        weights.push_back(T(wide.back()));
      }
      offsets.push_back(int32_t(columns.size()));
    }
  }
};

template <class Storage>
void run(const RuleEntry& rule, int dtype, int64_t n, int64_t dim, MixingForm form, int threads) {
  using T = Compute<Storage>;
  const double hyper[] = {0.1, 0.9, 0.8, 0.01, 3.0, 1.0, 0.5, 0.25};
  const Ring<T> ring(n);
  Matrix<Storage> x(n, dim, 0), g(n, dim, 1000), x_split = x;
  std::vector<Matrix<T>> state, state_split;
  for (int k = 0; k < rule.states; ++k) state.emplace_back(n, dim, 2000 + k);
  for (auto& vector : state) {  // not negative: rules take square roots of some
    for (T& value : vector.data) value = std::abs(value);
  }
  state_split = state;

  std::vector<T> row_scalars;
  for (int64_t k = 0; k < n * rule.row_scalars; ++k) row_scalars.push_back(T(0.5 + 0.125 * double(k)));
  const int64_t blocks = rule.norm_state < 0 ? 0 : reduce_blocks(dim);
  std::vector<double> block_sums(size_t(n * blocks), -1.0), block_sums_split = block_sums;

  GossipStepArguments fused{};
  fused.x = x.data.data();
  fused.g = g.data.data();
  for (int k = 0; k < rule.states; ++k) fused.state[k] = state[size_t(k)].data.data();
  fused.rows = n;
  fused.cols = dim;
  fused.x_stride = fused.g_stride = fused.state_stride = dim + 1;
  fused.mixing.form = form;
  fused.mixing.row_offsets = ring.offsets.data();
  fused.mixing.columns = ring.columns.data();
  fused.mixing.weights = ring.weights.data();
  fused.hyper = hyper;
  fused.row_scalars = row_scalars.data();
  fused.block_sums = block_sums.data();
  fused.threads = threads;
  fused.simd = best_simd();
  rule.gossip_step[dtype](fused);

  std::vector<std::vector<Matrix<T>>> messages(size_t(rule.messages), std::vector<Matrix<T>>());
  for (auto& of_all : messages) {
    for (int64_t i = 0; i < n; ++i) of_all.emplace_back(1, dim, 0);
  }
  for (int64_t i = 0; i < n; ++i) {
    LocalStepArguments local{};
    local.x = x_split.row(i);
    local.g = g.row(i);
    for (int k = 0; k < rule.states; ++k) local.state[k] = state_split[size_t(k)].row(i);
    for (int k = 0; k < rule.messages; ++k) local.message[k] = messages[size_t(k)][size_t(i)].row(0);
    local.size = dim;
    local.hyper = hyper;
    local.row_scalars = row_scalars.data() + i * rule.row_scalars;
    local.threads = threads;
    local.simd = Simd::kBaseline;
    rule.local_step[dtype](local);
  }
  for (int64_t i = 0; i < n; ++i) {
    std::vector<int64_t> senders;
    std::vector<double> weights;
    if (form == MixingForm::kSparse) {
      for (int32_t q = ring.offsets[size_t(i)]; q < ring.offsets[size_t(i) + 1]; ++q) {
        senders.push_back(ring.columns[size_t(q)]);
        weights.push_back(ring.wide[size_t(q)]);
      }
    } else if (form == MixingForm::kMean) {
      for (int64_t j = 0; j < n; ++j) senders.push_back(j);
      weights.assign(size_t(n), 1.0 / double(n));
    } else {
      senders = {i};
      weights = {1.0};
    }
    std::vector<const void*> received;
    for (int k = 0; k < rule.messages; ++k) {
      for (const int64_t j : senders) received.push_back(messages[size_t(k)][size_t(j)].row(0));
    }
    MergeArguments merge{};
    merge.x = x_split.row(i);
    merge.g = g.row(i);
    for (int k = 0; k < rule.states; ++k) merge.state[k] = state_split[size_t(k)].row(i);
    merge.received = received.data();
    merge.weights = weights.data();
    merge.terms = int64_t(weights.size());
    merge.mean = form == MixingForm::kMean;
    merge.size = dim;
    merge.hyper = hyper;
    merge.row_scalars = row_scalars.data() + i * rule.row_scalars;
    merge.block_sums = block_sums_split.data() + i * blocks;
    merge.threads = threads;
    merge.simd = best_simd();
    rule.merge[dtype](merge);
  }

  check(same_bits(x, x_split), "fused x differs from split x", rule, n, dim);
  check(x.guarded() && x_split.guarded() && g.guarded(), "a guard value was overwritten", rule, n, dim);
  for (size_t k = 0; k < state.size(); ++k) {
    check(same_bits(state[k], state_split[k]), "fused state differs from split state", rule, n, dim);
    check(state[k].guarded(), "a guard value of the state was overwritten", rule, n, dim);
  }

  ReduceArguments reduce{};
  reduce.x = x.data.data();
  reduce.rows = n;
  reduce.cols = dim;
  reduce.stride = dim + 1;
  reduce.threads = threads;
  reduce.simd = best_simd();
  std::vector<double> norms(size_t(n), -1.0);
  std::vector<uint8_t> finite(size_t(n), 2);
  double distance = -1.0;
  squared_norms<Storage>(reduce, norms.data());
  consensus_distance<Storage>(reduce, &distance);
  rows_are_finite<Storage>(reduce, finite.data());
  if (blocks > 0) {
    std::vector<double> gathered(norms.size());
    sum_blocks(block_sums.data(), n, blocks, gathered.data());
    reduce.x = state[size_t(rule.norm_state)].data.data();
    squared_norms<T>(reduce, norms.data());
    check(gathered == norms && block_sums == block_sums_split, "sums of squares of the state", rule, n, dim);
  }
  check(std::isfinite(distance) && distance >= 0 && finite.back() == 1 && norms.back() >= 0, "reductions", rule, n,
        dim);
}

// No message loses its place before the last row that needs it is merged, every row is merged once, and places are few
// where few messages are waited for.
void check_plan(const std::vector<std::vector<int32_t>>& neighbours, MixingForm form, int64_t places) {
  const int64_t n = int64_t(neighbours.size());
  std::vector<int32_t> offsets{0}, columns;
  for (const auto& row : neighbours) {
    columns.insert(columns.end(), row.begin(), row.end());
    offsets.push_back(int32_t(columns.size()));
  }
  const MergePlan plan({form, offsets.data(), columns.data(), nullptr, int64_t(columns.size())}, n);
  std::vector<int64_t> owner(size_t(plan.places), -1), merged(size_t(n), 0);
  bool good = plan.places == places && int64_t(plan.turns.size()) == n;
  auto due = plan.turns.begin();
  for (int64_t i = 0; i <= n; ++i) {
    if (i < n) owner[size_t(plan.place[size_t(i)])] = i;
    for (; due != plan.turns.end() && due->after <= i; ++due) {
      const auto there = [&](int64_t j) { return owner[size_t(plan.place[size_t(j)])] == j; };
      good = good && there(due->row) && ++merged[size_t(due->row)] == 1;
      for (int64_t j = 0; j < n && form == MixingForm::kMean; ++j) good = good && there(j);
      for (const int32_t j : neighbours[size_t(due->row)]) good = good && there(j);
    }
  }
  if (good && due == plan.turns.end()) return;
  std::printf("FAILED: plan of %ld rows with %d places, %ld expected\n", long(n), plan.places, long(places));
  ++g_failures;
}

void check_plans() {
  std::vector<std::vector<int32_t>> ring, star, shift, alone(5);
  for (int32_t i = 0; i < 1000; ++i) {
    ring.push_back({i, (i + 1) % 1000, (i + 999) % 1000});
    std::sort(ring.back().begin(), ring.back().end());
    star.push_back(i == 500 ? std::vector<int32_t>{} : std::vector<int32_t>{i, 500});
    shift.push_back({(i + 7) % 1000});  // no row needs its own message
  }
  for (int32_t i = 0; i < 1000; ++i) star[500].push_back(i);
  check_plan(ring, MixingForm::kSparse, 5);     // 0 and 1 wait for the last, three are passed through
  check_plan(star, MixingForm::kSparse, 1000);  // the hub waits for all
  check_plan(shift, MixingForm::kSparse, 15);   // 0 to 6 wait for their readers at the end, eight are passed through
  check_plan(alone, MixingForm::kIdentity, 1);
  check_plan(alone, MixingForm::kMean, 5);
}

void run_all(int64_t n, int64_t dim, MixingForm form, int threads) {
  for (const RuleEntry& rule : registry()) {
    run<float>(rule, 0, n, dim, form, threads);
    run<double>(rule, 1, n, dim, form, threads);
    run<bfloat16>(rule, 2, n, dim, form, threads);
    run<float16>(rule, 3, n, dim, form, threads);
  }
}

}  // namespace

int main() {
  qgm::cpu::g_elements_per_thread = 512;  // threads from a few tiles on
  check_plans();
  const MixingForm forms[] = {MixingForm::kIdentity, MixingForm::kMean, MixingForm::kSparse};
  for (const MixingForm form : forms) {
    for (const int64_t n : {1, 2, 3, 6}) {
      for (const int64_t dim : {1, 63, 64, 65, 300, 577}) run_all(n, dim, form, 1);
    }
    run_all(3, 4 * kTileWidth + 205, form, 4);  // more than a tile for each of four threads
    for (const RuleEntry& rule : registry()) {  // and several blocks
      if (rule.norm_state >= 0) run<float>(rule, 0, 3, 5 * kReduceBlock + 77, form, 4);
    }
  }
  std::printf("%s: %zu rules\n", g_failures ? "FAILED" : "passed", registry().size());
  return g_failures ? 1 : 0;
}
