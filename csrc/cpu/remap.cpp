#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "checks.h"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

using Remapped = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Remapped remap_cpu(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                   const Tensor& sketch_keys, const Tensor& sketch_hot_rows, int64_t first_shard,
                   int64_t num_shards, int64_t num_hot_rows, int64_t hot_offset) {
  check_remap(ids, offsets, tables, sketch_keys, sketch_hot_rows);
  const int64_t num_features = tables.size(0);
  const int64_t batch_size = (offsets.numel() - 1) / num_features;
  const int64_t num_ids = ids.numel();
  const RemapLayout layout{tables.const_data_ptr<int64_t>(),
                           sketch_pointers(sketch_keys, sketch_hot_rows, nullptr, nullptr),
                           num_features,
                           batch_size,
                           first_shard,
                           num_shards,
                           sketch_keys.size(0),
                           num_hot_rows,
                           hot_offset};
  const int64_t* in = ids.const_data_ptr<int64_t>();
  const int64_t* in_offsets = offsets.const_data_ptr<int64_t>();

  Tensor rows = torch::stable::new_empty(ids, {num_ids});
  Tensor out_offsets = torch::stable::new_empty(ids, {num_features * batch_size + 1});
  Tensor source = torch::stable::new_empty(ids, {num_ids});
  Tensor bags = torch::stable::new_empty(ids, {num_ids});
  Tensor keys = torch::stable::new_empty(ids, {num_ids});
  Tensor shards = torch::stable::new_empty(ids, {num_ids}, ScalarType::Int);
  int64_t* out = out_offsets.mutable_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t b = 0; b < batch_size; ++b) {
    for (int64_t f = 0; f < num_features; ++f) {
      const int64_t* bag = in_offsets + f * batch_size + b;
      STD_TORCH_CHECK(bag[1] >= bag[0], "offsets must not descend");
      out[b * num_features + f] = total;
      total += bag[1] - bag[0];
    }
  }
  out[batch_size * num_features] = total;
  STD_TORCH_CHECK(in_offsets[0] == 0 && total == num_ids,
                  "offsets must ascend from 0 to the number of ids");

  int64_t* row_out = rows.mutable_data_ptr<int64_t>();
  int64_t* source_out = source.mutable_data_ptr<int64_t>();
  int64_t* bag_out = bags.mutable_data_ptr<int64_t>();
  int64_t* key_out = keys.mutable_data_ptr<int64_t>();
  int32_t* shard_out = shards.mutable_data_ptr<int32_t>();
  torch::stable::parallel_for(0, batch_size, 256, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t f = 0; f < num_features; ++f) {
        const int64_t bag = b * num_features + f;
        const int64_t first = in_offsets[f * batch_size + b];
        const Table table = Table::load(layout.tables, f);
        for (int64_t i = out[bag]; i < out[bag + 1]; ++i) {
          const int64_t from = first + i - out[bag];
          const RemapLayout::Place place = layout.place(table, in[from]);
          row_out[i] = place.row;
          source_out[i] = from;
          bag_out[i] = bag;
          key_out[i] = place.key;
          shard_out[i] = place.shard;
        }
      }
    }
  });
  return {rows, out_offsets, source, bags, keys, shards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("remap", TORCH_BOX(&remap_cpu)); }

}  // namespace torchrec_cafe
