#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

// Positions of the occurrences, grouped by shard and in batch order within each: what makes the
// result independent of the number of threads.
struct ByShard {
  std::vector<int32_t> order;
  std::vector<int64_t> begins;

  ByShard(const int32_t* shards, int64_t size, int64_t num_shards) : begins(num_shards + 1, 0) {
    for (int64_t i = 0; i < size; ++i) {
      STD_TORCH_CHECK(shards[i] >= -1 && shards[i] < num_shards, "shards must be in [-1, ",
                      num_shards, "), got ", shards[i]);
      if (shards[i] >= 0) ++begins[shards[i] + 1];
    }
    for (int64_t s = 0; s < num_shards; ++s) begins[s + 1] += begins[s];
    order.resize(begins[num_shards]);
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    for (int64_t i = 0; i < size; ++i) {
      if (shards[i] >= 0) order[next[shards[i]]++] = static_cast<int32_t>(i);
    }
  }
};

void observe_cpu(const Tensor& keys, const Tensor& shards, const Tensor& importance,
                 const Tensor& sketch_keys, const Tensor& sketch_scores,
                 const Tensor& sketch_hot_rows, const Tensor& norms, const Tensor& inflation,
                 const Tensor& counters, double growth, double norm_decay) {
  check_observe(keys, shards, importance, sketch_keys, sketch_scores, sketch_hot_rows, norms,
                inflation, counters);
  const int64_t num_shards = sketch_keys.size(0);
  const SketchPointers sketch =
      sketch_pointers(sketch_keys, sketch_hot_rows, &sketch_scores, nullptr);
  const StatisticsPointers stats = statistics_pointers(norms, inflation, counters);
  const int64_t* key_in = keys.const_data_ptr<int64_t>();
  const float* importance_in = importance.const_data_ptr<float>();
  const ByShard groups(shards.const_data_ptr<int32_t>(), keys.numel(), num_shards);
  for (int64_t i = 0; i < keys.numel() && stats.num_tables > 0; ++i) {
    const int64_t table = table_of(key_in[i]);
    STD_TORCH_CHECK(table >= 0 && table < stats.num_tables, "keys[", i, "] is of table ", table,
                    ", but norms has ", stats.num_tables);
  }
  torch::stable::parallel_for(0, num_shards, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Occurrences seen{groups.order.data() + groups.begins[s],
                             groups.begins[s + 1] - groups.begins[s], key_in, importance_in};
      observe(sketch.shard(s), seen, stats.shard(s), growth, norm_decay);
    }
  });
}

std::tuple<Tensor, Tensor> rebalance_cpu(const Tensor& selected, const Tensor& sketch_keys,
                                         const Tensor& sketch_scores, const Tensor& sketch_hot_rows,
                                         const Tensor& owners, const Tensor& inflation,
                                         const Tensor& counters, double min_score,
                                         double hysteresis) {
  check_rebalance(selected, sketch_keys, sketch_scores, sketch_hot_rows, owners, inflation,
                  counters);
  const int64_t num_selected = selected.numel();
  const int64_t num_shards = sketch_keys.size(0);
  const int64_t num_hot_rows = owners.size(1);
  const SketchPointers sketch =
      sketch_pointers(sketch_keys, sketch_hot_rows, &sketch_scores, &owners);
  Tensor actions =
      torch::stable::new_empty(selected, {num_selected, num_hot_rows}, ScalarType::Char);
  Tensor new_keys = torch::stable::new_empty(selected, {num_selected, num_hot_rows});
  const int64_t* chosen = selected.const_data_ptr<int64_t>();
  const double* inflated = inflation.const_data_ptr<double>();
  int64_t* counts = counters.mutable_data_ptr<int64_t>();
  int8_t* actions_out = actions.mutable_data_ptr<int8_t>();
  int64_t* keys_out = new_keys.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < num_selected; ++i) {
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < num_shards, "selected must be in [0, ",
                    num_shards, "), got ", chosen[i]);
    STD_TORCH_CHECK(i == 0 || chosen[i] > chosen[i - 1], "selected must ascend");
  }
  torch::stable::parallel_for(0, num_selected, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = chosen[i];
      const RebalanceCounts done =
          rebalance(sketch.shard(s), static_cast<float>(min_score * inflated[s]),
                    static_cast<float>(hysteresis), actions_out + i * num_hot_rows,
                    keys_out + i * num_hot_rows);
      counts[s * kCounters + kPromoted] += done.promoted;
      counts[s * kCounters + kDemoted] += done.demoted;
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
