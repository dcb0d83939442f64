// The state tensors of a sketch as plain pointers: what cpu/ and cuda/ hand to the algorithm. Which
// tensors an operator writes is said by its schema; the stable ABI hands all over as constants.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "hot_sketch.h"
#include "move_rows.h"
#include "row_map.h"

namespace torchrec_cafe {

inline HotSketch hot_sketch(const torch::stable::Tensor& buckets) {
  return HotSketch{static_cast<Bucket*>(buckets.data_ptr()), buckets.size(0), buckets.size(1)};
}

inline RowMap row_map(const torch::stable::Tensor& tables, const torch::stable::Tensor& offsets,
                      const torch::stable::Tensor& buckets, int64_t first_shard, int64_t num_shards,
                      const PoolRows& pool) {
  const int64_t num_features = tables.size(0);
  return RowMap{tables.const_data_ptr<int64_t>(),
                num_features,
                (offsets.numel() - 1) / num_features,
                first_shard,
                num_shards,
                buckets.size(1) > 0 ? buckets.size(0) : 0,
                pool};
}

// One selected shard of `rebalance`.
struct RebalanceState {
  HotSketch sketch;
  int32_t* owners;
  int64_t* counters;
  const double* inflation;
  int64_t num_hot_rows;

  CAFE_HOST_DEVICE Shard shard(int64_t s) const {
    return Shard{sketch.buckets + s * sketch.num_buckets, owners + s * num_hot_rows,
                 sketch.num_buckets, num_hot_rows};
  }
};

inline RebalanceState rebalance_state(const torch::stable::Tensor& buckets,
                                      const torch::stable::Tensor& owners,
                                      const torch::stable::Tensor& inflation,
                                      const torch::stable::Tensor& counters) {
  return RebalanceState{hot_sketch(buckets), static_cast<int32_t*>(owners.data_ptr()),
                        static_cast<int64_t*>(counters.data_ptr()),
                        inflation.const_data_ptr<double>(), owners.size(1)};
}

inline RowMoves row_moves(const torch::stable::Tensor& actions,
                          const torch::stable::Tensor& new_keys,
                          const torch::stable::Tensor& selected,
                          const torch::stable::Tensor& tables, int64_t rows_per_shard,
                          int64_t hot_offset) {
  return RowMoves{actions.const_data_ptr<int8_t>(),
                  new_keys.const_data_ptr<int64_t>(),
                  selected.const_data_ptr<int64_t>(),
                  tables.const_data_ptr<int64_t>(),
                  selected.numel(),
                  tables.size(0),
                  PoolRows{hot_offset, rows_per_shard, actions.size(1)}};
}

}  // namespace torchrec_cafe
