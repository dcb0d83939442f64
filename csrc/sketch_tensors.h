// The state tensors of a sketch as plain pointers: what cpu/ and cuda/ hand to the algorithm.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "hot_sketch_observe.h"

namespace torchrec_cafe {

struct SketchPointers {
  int64_t* keys;
  float* scores;
  int32_t* hot_rows;
  int32_t* owners;
  int64_t num_buckets;
  int64_t num_hot_rows;

  CAFE_HOST_DEVICE HotSketchShard shard(int64_t s) const {
    const int64_t slots = s * num_buckets * kSlots;
    return HotSketchShard{keys + slots,     scores == nullptr ? nullptr : scores + slots,
                          hot_rows + slots, owners == nullptr ? nullptr : owners + s * num_hot_rows,
                          num_buckets,      num_hot_rows};
  }
};

// The sketch of the operators' arguments. Which tensors an operator writes is said by its schema;
// the stable ABI hands all of them over as constant references.
inline SketchPointers sketch_pointers(const torch::stable::Tensor& keys,
                                      const torch::stable::Tensor& hot_rows,
                                      const torch::stable::Tensor* scores,
                                      const torch::stable::Tensor* owners) {
  return SketchPointers{static_cast<int64_t*>(keys.data_ptr()),
                        scores == nullptr ? nullptr : static_cast<float*>(scores->data_ptr()),
                        static_cast<int32_t*>(hot_rows.data_ptr()),
                        owners == nullptr ? nullptr : static_cast<int32_t*>(owners->data_ptr()),
                        keys.size(1),
                        owners == nullptr ? 0 : owners->size(1)};
}

struct StatisticsPointers {
  double* norms;
  double* inflation;
  int64_t* counters;
  int64_t num_tables;

  CAFE_HOST_DEVICE ShardStatistics shard(int64_t s) const {
    return ShardStatistics{norms + s * num_tables * 2, num_tables, inflation + s,
                           counters + s * kCounters};
  }
};

inline StatisticsPointers statistics_pointers(const torch::stable::Tensor& norms,
                                              const torch::stable::Tensor& inflation,
                                              const torch::stable::Tensor& counters) {
  return StatisticsPointers{norms.mutable_data_ptr<double>(), inflation.mutable_data_ptr<double>(),
                            counters.mutable_data_ptr<int64_t>(), norms.size(1)};
}

// What `remap` reads besides the ids.
struct RemapLayout {
  const int64_t* tables;
  SketchPointers sketch;
  int64_t num_features;
  int64_t batch_size;
  int64_t first_shard;  // global number of this rank's first shard
  int64_t num_shards;   // over all ranks
  int64_t shards_held;  // on this rank
  int64_t rows_per_shard;
  int64_t hot_offset;  // physical row of the first hot row

  struct Place {
    int64_t row;
    int64_t key;
    int32_t shard;  // on this rank, or -1: not tracked
  };

  CAFE_HOST_DEVICE Place place(const Table& table, int64_t local_id) const {
    const int64_t mixed_id = table.first_id + local_id;
    const int64_t shared_row = table.shared_row(mixed_id);
    Place place{table.row_offset + shared_row, 0, -1};
    if (table.index < 0) return place;
    place.key = table.key(mixed_id);
    const int64_t held = table.shard(shared_row, num_shards) - first_shard;
    if (held < 0 || held >= shards_held) return place;
    place.shard = static_cast<int32_t>(held);
    const HotSketchShard shard = sketch.shard(held);
    const int64_t slot = shard.num_buckets > 0 ? shard.find(place.key) : -1;
    if (slot >= 0 && shard.hot_rows[slot] >= 0) {
      place.row = hot_offset + held * rows_per_shard + shard.hot_rows[slot];
    }
    return place;
  }
};

}  // namespace torchrec_cafe
