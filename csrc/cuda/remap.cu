#include <tuple>

#include "checks.h"
#include "launch.cuh"
#include "scan.cuh"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

using Remapped = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// lengths[1 + b * F + f] = length of bag (f, b); lengths[0] = 0.
__global__ void bag_lengths_kernel(const int64_t* __restrict__ offsets, int64_t num_ids,
                                   int64_t num_features, int64_t batch_size,
                                   int64_t* __restrict__ lengths) {
  const int64_t num_bags = num_features * batch_size;
  for (int64_t bag = first_index(); bag < num_bags; bag += index_stride()) {
    const int64_t* in = offsets + (bag % num_features) * batch_size + bag / num_features;
    lengths[1 + bag] = bag_length(in, num_ids);
    if (bag == 0) lengths[0] = 0;
  }
}

struct RemapOutput {
  int64_t* rows;
  int32_t* source;  // or null
  int64_t* keys;    // of the ids as they come; null without hot rows
  int32_t* shards;
  int32_t* second;       // of `rows`; null without second rows
  int32_t* cold_shards;  // as `shards`, below 0 for hot ids too; or null
};

__global__ void remap_kernel(RowMap map, HotSketch sketch, const int64_t* __restrict__ ids,
                             int64_t num_ids, const int64_t* __restrict__ offsets,
                             const int64_t* __restrict__ out_offsets, RemapOutput out) {
  const int64_t num_bags = map.num_features * map.batch_size;
  for (int64_t bag = first_index(); bag < num_bags; bag += index_stride()) {
    const int64_t feature = bag % map.num_features;
    const Table table = Table::load(map.tables, feature);
    const double ratio = table.shards_per_row(map.num_shards);
    const int64_t first = bag_begin(offsets + feature * map.batch_size + bag / map.num_features);
    const int64_t end = min(out_offsets[bag + 1], num_ids);
    for (int64_t i = out_offsets[bag]; i < end; ++i) {
      const int64_t from = first + i - out_offsets[bag];
      if (from < 0 || from >= num_ids) continue;
      const int64_t mixed_id = table.first_id + ids[from];
      const int64_t shared_row = table.shared_row(mixed_id);
      int32_t row = kCold;
      int32_t shard = -1;
      if (table.index >= 0 && out.keys != nullptr) {
        const int64_t key = table.key(mixed_id);
        shard = map.held_shard(table, shared_row, ratio);
        if (shard >= 0) {
          const Bucket bucket = sketch.buckets[sketch.bucket_index(shard, key)];
          row = hot_row(bucket, key);
          if (out.second != nullptr && is_medium(bucket, key)) {
            out.second[i] = static_cast<int32_t>(map.pool.second(shard, key));
          }
        }
        out.keys[from] = key;
      }
      out.rows[i] = row >= 0 ? map.pool.hot(shard, row) : table.row_offset + shared_row;
      if (out.source != nullptr) out.source[i] = static_cast<int32_t>(from);
      if (out.shards != nullptr) out.shards[from] = shard;
      if (out.cold_shards != nullptr) out.cold_shards[from] = row >= 0 ? -1 : shard;
    }
  }
}

Remapped remap_cuda(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                    const Tensor& buckets, int64_t first_shard, int64_t num_shards,
                    int64_t hot_rows_per_shard, int64_t rows_per_shard, int64_t hot_offset,
                    bool with_source) {
  const PoolRows pool{hot_offset, rows_per_shard, hot_rows_per_shard};
  check_remap(ids, offsets, tables, buckets, num_shards, pool);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const RowMap map = row_map(tables, offsets, buckets, first_shard, num_shards, pool);
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t num_ids = ids.numel();
  const int64_t num_tracked = num_shards > 0 ? num_ids : 0;
  // Zeros, so that whatever offsets cannot be mapped points nowhere out of bounds.
  Tensor rows = torch::stable::new_zeros(ids, {num_ids});
  Tensor source = torch::stable::new_zeros(ids, {with_source ? num_ids : 0}, ScalarType::Int);
  Tensor keys = torch::stable::new_zeros(ids, {num_tracked});
  Tensor shards = torch::stable::new_empty(ids, {num_tracked}, ScalarType::Int);
  torch::stable::fill_(shards, -1);
  const int64_t num_second = map.has_second_rows() ? num_tracked : 0;
  Tensor second = torch::stable::new_empty(ids, {num_second}, ScalarType::Int);
  torch::stable::fill_(second, -1);
  const int64_t num_cold = with_source ? num_tracked : 0;
  Tensor cold_shards = torch::stable::new_empty(ids, {num_cold}, ScalarType::Int);
  torch::stable::fill_(cold_shards, -1);
  Tensor lengths = torch::stable::new_zeros(ids, {num_bags + 1});
  if (num_bags == 0) return {rows, lengths, source, keys, shards, second, cold_shards};
  const cudaStream_t stream = current_stream(ids);
  launch(stream, num_bags, bag_lengths_kernel, offsets.const_data_ptr<int64_t>(), num_ids,
         map.num_features, map.batch_size, lengths.mutable_data_ptr<int64_t>());
  Tensor out_offsets = cumsum(lengths);
  const RemapOutput out{rows.mutable_data_ptr<int64_t>(),
                        with_source ? source.mutable_data_ptr<int32_t>() : nullptr,
                        num_tracked > 0 ? keys.mutable_data_ptr<int64_t>() : nullptr,
                        num_tracked > 0 ? shards.mutable_data_ptr<int32_t>() : nullptr,
                        num_second > 0 ? second.mutable_data_ptr<int32_t>() : nullptr,
                        num_cold > 0 ? cold_shards.mutable_data_ptr<int32_t>() : nullptr};
  launch(stream, num_bags, remap_kernel, map, hot_sketch(buckets), ids.const_data_ptr<int64_t>(),
         num_ids, offsets.const_data_ptr<int64_t>(), out_offsets.const_data_ptr<int64_t>(), out);
  return {rows, out_offsets, source, keys, shards, second, cold_shards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("remap", TORCH_BOX(&remap_cuda));
}

}  // namespace torchrec_cafe
