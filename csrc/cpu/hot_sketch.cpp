#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/observe.h"
#include "cpu/observe_in_parallel.h"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

// Below this many occurrences per thread, starting the threads costs more than they save.
constexpr int64_t kOccurrencesPerThread = 2048;

void inflate_shards(const HotSketch& sketch, double* inflation, double growth) {
  for (int64_t s = 0; s < sketch.num_shards; ++s) {
    if (!inflate(inflation[s], growth)) continue;
    kernels().renormalise(sketch.buckets + s * sketch.num_buckets, sketch.num_buckets);
  }
}

}  // namespace

void check_shards(const Tensor& shards, int64_t begin, int64_t end, int64_t num_shards) {
  const int32_t* values = shards.const_data_ptr<int32_t>();
  if (kernels().shards_fit(values + begin, end - begin, num_shards)) return;
  for (int64_t i = begin; i < end; ++i) {  // says which
    STD_TORCH_CHECK(values[i] >= -1 && values[i] < num_shards, "`shards` must be in [-1, ",
                    num_shards, "), got ", values[i]);
  }
}

void observe_checked(const Tensor& keys, const Tensor& shards, const float* importance,
                     const std::vector<Range>& ranges, const Tensor& buckets,
                     const Tensor& inflation, const Tensor& counters, double growth) {
  const HotSketch sketch = hot_sketch(buckets);
  if (sketch.num_shards == 0) return;
  double* inflated = inflation.mutable_data_ptr<double>();
  inflate_shards(sketch, inflated, growth);
  const bool same_inflation = std::all_of(inflated, inflated + sketch.num_shards,
                                          [&](double inflation) { return inflation == *inflated; });
  std::vector<Occurrences> parts;
  int64_t size = 0;
  for (const Range& range : ranges) {
    size += range.end - range.begin;
    parts.push_back({keys.const_data_ptr<int64_t>() + range.begin,
                     shards.const_data_ptr<int32_t>() + range.begin, importance + range.begin,
                     inflated, same_inflation, range.end - range.begin});
  }
  const int64_t most =
      std::min<int64_t>({torch::stable::get_num_threads(), sketch.num_shards, kShardGroups});
  const int64_t num_threads = std::clamp<int64_t>(size / kOccurrencesPerThread, 1, most);
  std::vector<Events> events(num_threads * sketch.num_shards);
  if (num_threads == 1) {
    for (const Occurrences& seen : parts) kernels().observe(sketch, seen, events.data());
  } else {
    observe_in_parallel(kernels(), sketch, parts, num_threads, events.data(),
                        [](int64_t tasks, const auto& run) {
                          torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                            for (int64_t task = begin; task < end; ++task) run(task);
                          });
                        });
  }
  int64_t* counts = counters.mutable_data_ptr<int64_t>();
  for (int64_t s = 0; s < sketch.num_shards; ++s) {
    counts[s * kCounters + kSteps] += 1;
    for (int64_t t = 0; t < num_threads; ++t) {
      const Events& event = events[t * sketch.num_shards + s];
      counts[s * kCounters + kNonFinite] += event.non_finite;
      counts[s * kCounters + kSkippedKeys] += event.skipped();
      counts[s * kCounters + kReplacedKeys] += event.replaced();
    }
  }
}

namespace {

void observe_cpu(const Tensor& keys, const Tensor& shards, const Tensor& importance,
                 const Tensor& buckets, const Tensor& inflation, const Tensor& counters,
                 double growth) {
  check_observe(keys, shards, importance, buckets, inflation, counters);
  check_shards(shards, 0, shards.numel(), buckets.size(0));
  observe_checked(keys, shards, importance.const_data_ptr<float>(), {{0, keys.numel()}}, buckets,
                  inflation, counters, growth);
}

std::tuple<Tensor, Tensor> rebalance_cpu(const Tensor& selected, const Tensor& buckets,
                                         const Tensor& owners, const Tensor& inflation,
                                         const Tensor& counters, double min_score,
                                         double hysteresis, int64_t num_medium) {
  check_rebalance(selected, buckets, owners, inflation, counters);
  const RebalanceState state = rebalance_state(buckets, owners, inflation, counters);
  const int64_t num_selected = selected.numel();
  Tensor actions =
      torch::stable::new_empty(selected, {num_selected, state.num_hot_rows}, ScalarType::Char);
  Tensor new_keys = torch::stable::new_empty(selected, {num_selected, state.num_hot_rows});
  const int64_t* chosen = selected.const_data_ptr<int64_t>();
  int8_t* actions_out = actions.mutable_data_ptr<int8_t>();
  int64_t* keys_out = new_keys.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < num_selected; ++i) {
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < state.sketch.num_shards,
                    "`selected` must be in [0, ", state.sketch.num_shards, "), got ", chosen[i]);
    STD_TORCH_CHECK(i == 0 || chosen[i] > chosen[i - 1], "`selected` must ascend");
    const int64_t slots = std::min<int64_t>(state.sketch.num_buckets * kSlots, INT32_MAX);
    const int32_t* owners_of = state.owners + chosen[i] * state.num_hot_rows;
    STD_TORCH_CHECK(kernels().shards_fit(owners_of, state.num_hot_rows, slots),
                    "`owners` must be -1 or slots of the shard, of which there are ", slots);
  }
  torch::stable::parallel_for(0, num_selected, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t* counts = state.counters + chosen[i] * kCounters;
      kernels().rebalance(
          state.shard(chosen[i]), static_cast<float>(min_score * state.inflation[chosen[i]]),
          static_cast<float>(hysteresis), num_medium, actions_out + i * state.num_hot_rows,
          keys_out + i * state.num_hot_rows, counts + kPromoted, counts + kDemoted);
    }
  });
  return {actions, new_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("observe", TORCH_BOX(&observe_cpu));
  m.impl("rebalance", TORCH_BOX(&rebalance_cpu));
}

}  // namespace torchrec_cafe
