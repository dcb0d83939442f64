#include <array>
#include <tuple>

#include "checks.h"
#include "launch.cuh"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

using Remapped = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// lengths[1 + b * F + f] = length of bag (f, b); lengths[0] = 0.
__global__ void bag_lengths_kernel(const int64_t* __restrict__ offsets, int64_t num_features,
                                   int64_t batch_size, int64_t* __restrict__ lengths) {
  const int64_t num_bags = num_features * batch_size;
  for (int64_t bag = first_index(); bag < num_bags; bag += index_stride()) {
    const int64_t* in = offsets + (bag % num_features) * batch_size + bag / num_features;
    lengths[1 + bag] = in[1] - in[0];
    if (bag == 0) lengths[0] = 0;
  }
}

struct RemapOutputs {
  int64_t* rows;
  int64_t* source;
  int64_t* bags;
  int64_t* keys;
  int32_t* shards;
};

__global__ void remap_kernel(RemapLayout layout, const int64_t* __restrict__ ids, int64_t num_ids,
                             const int64_t* __restrict__ offsets,
                             const int64_t* __restrict__ out_offsets, RemapOutputs out) {
  const int64_t num_bags = layout.num_features * layout.batch_size;
  for (int64_t bag = first_index(); bag < num_bags; bag += index_stride()) {
    const int64_t feature = bag % layout.num_features;
    const Table table = Table::load(layout.tables, feature);
    const int64_t first = offsets[feature * layout.batch_size + bag / layout.num_features];
    const int64_t end = min(out_offsets[bag + 1], num_ids);
    for (int64_t i = out_offsets[bag]; i < end; ++i) {
      const int64_t from = first + i - out_offsets[bag];
      const RemapLayout::Place place = layout.place(table, ids[from]);
      out.rows[i] = place.row;
      out.source[i] = from;
      out.bags[i] = bag;
      out.keys[i] = place.key;
      out.shards[i] = place.shard;
    }
  }
}

Tensor cumsum(const Tensor& tensor) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(int64_t{0}),
      torch::stable::detail::from(std::optional<ScalarType>(ScalarType::Long))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Remapped remap_cuda(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                    const Tensor& sketch_keys, const Tensor& sketch_hot_rows, int64_t first_shard,
                    int64_t num_shards, int64_t num_hot_rows, int64_t hot_offset) {
  check_remap(ids, offsets, tables, sketch_keys, sketch_hot_rows);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const int64_t num_features = tables.size(0);
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t num_ids = ids.numel();
  const RemapLayout layout{tables.const_data_ptr<int64_t>(),
                           sketch_pointers(sketch_keys, sketch_hot_rows, nullptr, nullptr),
                           num_features,
                           num_bags / num_features,
                           first_shard,
                           num_shards,
                           sketch_keys.size(0),
                           num_hot_rows,
                           hot_offset};
  Tensor rows = torch::stable::empty_like(ids);
  Tensor source = torch::stable::empty_like(ids);
  Tensor bags = torch::stable::empty_like(ids);
  Tensor keys = torch::stable::empty_like(ids);
  Tensor shards = torch::stable::new_empty(ids, {num_ids}, ScalarType::Int);
  Tensor lengths = torch::stable::new_zeros(ids, {num_bags + 1});
  if (num_bags == 0) return {rows, lengths, source, bags, keys, shards};
  const cudaStream_t stream = current_stream(ids);
  bag_lengths_kernel<<<grid_size(num_bags), kThreads, 0, stream>>>(
      offsets.const_data_ptr<int64_t>(), num_features, layout.batch_size,
      lengths.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor out_offsets = cumsum(lengths);
  const RemapOutputs out{rows.mutable_data_ptr<int64_t>(), source.mutable_data_ptr<int64_t>(),
                         bags.mutable_data_ptr<int64_t>(), keys.mutable_data_ptr<int64_t>(),
                         shards.mutable_data_ptr<int32_t>()};
  remap_kernel<<<grid_size(num_bags), kThreads, 0, stream>>>(
      layout, ids.const_data_ptr<int64_t>(), num_ids, offsets.const_data_ptr<int64_t>(),
      out_offsets.const_data_ptr<int64_t>(), out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {rows, out_offsets, source, bags, keys, shards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CUDA, m) { m.impl("remap", TORCH_BOX(&remap_cuda)); }

}  // namespace torchrec_cafe
