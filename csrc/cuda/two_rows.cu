// Bags whose ids have up to two rows, which the TBE adds up.
#include <tuple>

#include "checks.h"
#include "launch.cuh"
#include "scan.cuh"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

using Rows = std::tuple<Tensor, Tensor, Tensor>;

// What `add_second_rows` reads of a batch. Offsets out of range are cut.
struct Batch {
  const int64_t* rows;
  const int64_t* offsets;
  const int32_t* source;
  const int64_t* keys;
  const int32_t* shards;
  int64_t num_ids;
  int64_t num_bags;

  __device__ int64_t begin(int64_t bag) const { return max(offsets[bag], int64_t{0}); }
  __device__ int64_t end(int64_t bag) const { return min(offsets[bag + 1], num_ids); }
  __device__ bool is_medium(const HotSketch& sketch, int64_t i) const {
    const int32_t at = source[i];
    if (at < 0 || at >= num_ids || shards[at] < 0 || shards[at] >= sketch.num_shards) return false;
    return torchrec_cafe::is_medium(sketch.buckets[sketch.bucket_index(shards[at], keys[at])],
                                    keys[at]);
  }
};

// lengths[1 + bag] = rows of the bag; lengths[0] = 0.
__global__ void count_rows_kernel(Batch batch, HotSketch sketch, int64_t* __restrict__ lengths) {
  for (int64_t bag = first_index(); bag < batch.num_bags; bag += index_stride()) {
    int64_t length = 0;
    for (int64_t i = batch.begin(bag); i < batch.end(bag); ++i) {
      length += batch.is_medium(sketch, i) ? 2 : 1;
    }
    lengths[1 + bag] = length;
    if (bag == 0) lengths[0] = 0;
  }
}

__global__ void write_rows_kernel(Batch batch, HotSketch sketch, PoolRows pool,
                                  const int64_t* __restrict__ out_offsets,
                                  int64_t* __restrict__ rows, int32_t* __restrict__ source) {
  for (int64_t bag = first_index(); bag < batch.num_bags; bag += index_stride()) {
    int64_t next = out_offsets[bag];
    for (int64_t i = batch.begin(bag); i < batch.end(bag); ++i) {
      rows[next] = batch.rows[i];
      source[next++] = batch.source[i];
      if (!batch.is_medium(sketch, i)) continue;
      rows[next] = pool.second(batch.shards[batch.source[i]], batch.keys[batch.source[i]]);
      source[next++] = batch.source[i];
    }
  }
}

int64_t last_value(const Tensor& tensor, cudaStream_t stream) {
  int64_t value = 0;
  const auto* from = static_cast<const int64_t*>(tensor.data_ptr()) + tensor.numel() - 1;
  STD_CUDA_CHECK(cudaMemcpyAsync(&value, from, sizeof(value), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return value;
}

Rows add_second_rows_cuda(const Tensor& rows, const Tensor& offsets, const Tensor& source,
                          const Tensor& keys, const Tensor& shards, const Tensor& buckets,
                          int64_t hot_rows_per_shard, int64_t rows_per_shard, int64_t hot_offset) {
  check_second_rows(rows, offsets, source, keys, shards, buckets, hot_rows_per_shard,
                    rows_per_shard);
  const HotSketch sketch = hot_sketch(buckets);
  const int64_t num_bags = offsets.numel() - 1;
  if (sketch.num_shards == 0 || sketch.num_buckets == 0 || num_bags == 0) {
    return {rows, offsets, source};
  }
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows);
  const Batch batch{rows.const_data_ptr<int64_t>(),
                    offsets.const_data_ptr<int64_t>(),
                    source.const_data_ptr<int32_t>(),
                    keys.const_data_ptr<int64_t>(),
                    shards.const_data_ptr<int32_t>(),
                    rows.numel(),
                    num_bags};
  const Tensor lengths = torch::stable::new_empty(rows, {num_bags + 1});
  count_rows_kernel<<<grid_size(num_bags), kThreads, 0, stream>>>(
      batch, sketch, static_cast<int64_t*>(lengths.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor out_offsets = cumsum(lengths);
  const int64_t size = last_value(out_offsets, stream);
  Tensor out_rows = torch::stable::new_empty(rows, {size});
  Tensor out_source = torch::stable::new_empty(source, {size});
  write_rows_kernel<<<grid_size(num_bags), kThreads, 0, stream>>>(
      batch, sketch, PoolRows{hot_offset, rows_per_shard, hot_rows_per_shard},
      out_offsets.const_data_ptr<int64_t>(), out_rows.mutable_data_ptr<int64_t>(),
      out_source.mutable_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out_rows, out_offsets, out_source};
}

__global__ void double_lengths_kernel(const int64_t* __restrict__ offsets, int64_t num_features,
                                      int64_t batch_size, int64_t* __restrict__ lengths) {
  for (int64_t bag = first_index(); bag < num_features * batch_size; bag += index_stride()) {
    const int64_t* in = offsets + bag % num_features * batch_size + bag / num_features;
    lengths[1 + bag] = 2 * max(in[1] - in[0], int64_t{0});
    if (bag == 0) lengths[0] = 0;
  }
}

__global__ void quotient_remainder_kernel(const int64_t* __restrict__ ids, int64_t num_ids,
                                          const int64_t* __restrict__ offsets,
                                          const int64_t* __restrict__ tables, int64_t num_features,
                                          int64_t batch_size,
                                          const int64_t* __restrict__ out_offsets,
                                          int64_t* __restrict__ rows,
                                          int32_t* __restrict__ source) {
  for (int64_t bag = first_index(); bag < num_features * batch_size; bag += index_stride()) {
    const int64_t feature = bag % num_features;
    const auto map = QuotientRemainder::load(tables, feature);
    const int64_t first = offsets[feature * batch_size + bag / num_features];
    const int64_t end = min(out_offsets[bag + 1], 2 * num_ids);
    for (int64_t i = out_offsets[bag]; i + 1 < end; i += 2) {
      const int64_t from = first + (i - out_offsets[bag]) / 2;
      if (from < 0 || from >= num_ids) continue;
      const QuotientRemainder::Rows pair = map.rows(ids[from]);
      rows[i] = pair.remainder;
      rows[i + 1] = pair.quotient;
      source[i] = source[i + 1] = static_cast<int32_t>(from);
    }
  }
}

Rows quotient_remainder_cuda(const Tensor& ids, const Tensor& offsets, const Tensor& tables) {
  check_quotient_remainder(ids, offsets, tables);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t num_features = tables.size(0);
  const int64_t num_ids = ids.numel();
  // Zeros, so that whatever offsets cannot be mapped points nowhere out of bounds.
  Tensor rows = torch::stable::new_zeros(ids, {2 * num_ids});
  Tensor source = torch::stable::new_zeros(ids, {2 * num_ids}, ScalarType::Int);
  Tensor lengths = torch::stable::new_zeros(ids, {num_bags + 1});
  if (num_bags == 0) return {rows, lengths, source};
  const cudaStream_t stream = current_stream(ids);
  double_lengths_kernel<<<grid_size(num_bags), kThreads, 0, stream>>>(
      offsets.const_data_ptr<int64_t>(), num_features, num_bags / num_features,
      lengths.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor out_offsets = cumsum(lengths);
  quotient_remainder_kernel<<<grid_size(num_bags), kThreads, 0, stream>>>(
      ids.const_data_ptr<int64_t>(), num_ids, offsets.const_data_ptr<int64_t>(),
      tables.const_data_ptr<int64_t>(), num_features, num_bags / num_features,
      out_offsets.const_data_ptr<int64_t>(), rows.mutable_data_ptr<int64_t>(),
      source.mutable_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {rows, out_offsets, source};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CUDA, m) {
  m.impl("add_second_rows", TORCH_BOX(&add_second_rows_cuda));
  m.impl("quotient_remainder", TORCH_BOX(&quotient_remainder_cuda));
}

}  // namespace torchrec_cafe
