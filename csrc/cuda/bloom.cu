// Bloom encodings of ids: their token rows, and their weights.
#include <cuda_fp16.h>

#include <algorithm>
#include <tuple>

#include "bloom.h"
#include "bloom_batch.cuh"
#include "checks.h"
#include "launch.cuh"
#include "rows.cuh"
#include "scan.cuh"

namespace torchrec_cafe {
namespace {

// lengths[1 + bag] = rows of the bag; lengths[0] = 0.
__global__ void count_bits_kernel(Batch batch, BloomEncoder encoder,
                                  int64_t* __restrict__ lengths) {
  for (int64_t bag = first_index(); bag < batch.num_bags(); bag += index_stride()) {
    const int64_t from = feature_major(batch, bag);
    const Table table = Table::load(batch.tables, bag % batch.num_features);
    int64_t bits[kMaxHashes];
    int64_t length = 0;
    for (int64_t i = batch.begin(from); i < batch.end(from); ++i) {
      length += encoder.encode(table, batch.ids[i], bits);
    }
    lengths[1 + bag] = length;
    if (bag == 0) lengths[0] = 0;
  }
}

// Bags that overlap may have more rows than there is room for.
__global__ void write_bits_kernel(Batch batch, BloomEncoder encoder,
                                  const int64_t* __restrict__ out_offsets, int64_t room,
                                  int64_t* __restrict__ rows, int32_t* __restrict__ source) {
  for (int64_t bag = first_index(); bag < batch.num_bags(); bag += index_stride()) {
    const int64_t from = feature_major(batch, bag);
    const Table table = Table::load(batch.tables, bag % batch.num_features);
    int64_t bits[kMaxHashes];
    int64_t next = out_offsets[bag];
    for (int64_t i = batch.begin(from); i < batch.end(from); ++i) {
      const int size = encoder.encode(table, batch.ids[i], bits);
      for (int j = 0; j < size && next < room; ++j) {
        rows[next] = bits[j];
        source[next++] = static_cast<int32_t>(i);
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> bloom_rows_cuda(const Tensor& ids, const Tensor& offsets,
                                                   const Tensor& tables, int64_t first_shard,
                                                   int64_t shards_held, int64_t rows_per_shard,
                                                   int64_t num_hashes) {
  check_bloom(ids, offsets, tables, shards_held, rows_per_shard, num_hashes);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const cudaStream_t stream = current_stream(ids);
  const Batch batch(ids, offsets, tables);
  const BloomEncoder encoder(first_shard, shards_held, rows_per_shard, num_hashes, kTokenPairs);
  const Tensor lengths = torch::stable::new_zeros(ids, {batch.num_bags() + 1});
  if (batch.num_bags() > 0) {
    launch(stream, batch.num_bags(), count_bits_kernel, batch, encoder,
           static_cast<int64_t*>(lengths.data_ptr()));
  }
  Tensor out_offsets = cumsum(lengths);
  // With one hash every id has one row, and there is no need to wait for the number.
  const int64_t size = num_hashes == 1 ? ids.numel() : last_value(out_offsets, stream);
  Tensor rows = torch::stable::new_zeros(ids, {size});
  Tensor source = torch::stable::new_zeros(ids, {size}, ScalarType::Int);
  if (batch.num_bags() > 0) {
    launch(stream, batch.num_bags(), write_bits_kernel, batch, encoder,
           out_offsets.const_data_ptr<int64_t>(), size, rows.mutable_data_ptr<int64_t>(),
           source.mutable_data_ptr<int32_t>());
  }
  return {rows, out_offsets, source};
}

__global__ void weigh_kernel(Batch batch, BloomEncoder encoder, const float* __restrict__ weights,
                             float* __restrict__ factors) {
  for (int64_t bag = first_index(); bag < batch.num_bags(); bag += index_stride()) {
    const Table table = Table::load(batch.tables, bag / batch.batch_size);
    int64_t bits[kMaxHashes];
    for (int64_t i = batch.begin(bag); i < batch.end(bag); ++i) {
      const int size = encoder.encode(table, batch.ids[i], bits);
      float sum = 0.0f;
      for (int j = 0; j < size; ++j) sum += weights[bits[j]];
      factors[i] = sum;
    }
  }
}

Tensor bloom_weigh_cuda(const Tensor& weights, const Tensor& ids, const Tensor& offsets,
                        const Tensor& tables, int64_t first_shard, int64_t num_hashes) {
  check_bloom_weights(weights, ids, offsets, tables, num_hashes);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const Batch batch(ids, offsets, tables);
  const BloomEncoder encoder(first_shard, weights.size(0), weights.size(1), num_hashes,
                             kWeightPairs);
  Tensor factors = torch::stable::new_zeros(weights, {ids.numel()});
  if (batch.num_bags() > 0) {
    launch(current_stream(ids), batch.num_bags(), weigh_kernel, batch, encoder,
           weights.const_data_ptr<float>(), factors.mutable_data_ptr<float>());
  }
  return factors;
}

// A warp a bag: each lane encodes an id, and then all lanes add up its rows, a few columns each.
template <typename T>
__global__ void pool_kernel(Batch batch, BloomEncoder token_rows, BloomEncoder token_weights,
                            const T* __restrict__ rows, int64_t dim,
                            const float* __restrict__ weights,
                            const float* __restrict__ per_sample_weights,
                            float* __restrict__ pooled) {
  constexpr int kColumns = 4;  // of a lane
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarp;
  for (int64_t bag = first_index() / kWarp; bag < batch.num_bags(); bag += index_stride() / kWarp) {
    const int64_t from = feature_major(batch, bag);
    const int64_t end = batch.end(from);
    const Table table = Table::load(batch.tables, bag % batch.num_features);
    for (int64_t first = 0; first < dim; first += kWarp * kColumns) {
      float sums[kColumns] = {};
      for (int64_t i = batch.begin(from); i < end; i += kWarp) {
        int64_t bits[kMaxHashes] = {};
        int size = 0;
        float factor = 0.0f;
        if (i + lane < end) {
          size = token_weights.encode(table, batch.ids[i + lane], bits);
          for (int j = 0; j < size; ++j) factor += weights[bits[j]];
          if (per_sample_weights != nullptr) factor *= per_sample_weights[i + lane];
          size = token_rows.encode(table, batch.ids[i + lane], bits);
        }
        for (int other = 0; other < kWarp; ++other) {
          const float scale = __shfl_sync(kAll, factor, other);
          const int count = __shfl_sync(kAll, size, other);
          for (int j = 0; j < count; ++j) {
            const T* row = rows + __shfl_sync(kAll, bits[j], other) * dim;
            for (int c = 0; c < kColumns; ++c) {
              const int64_t column = first + c * kWarp + lane;
              if (column < dim) sums[c] += scale * to_float(row[column]);
            }
          }
        }
      }
      for (int c = 0; c < kColumns; ++c) {
        const int64_t column = first + c * kWarp + lane;
        if (column < dim) pooled[bag * dim + column] = sums[c];
      }
    }
  }
}

Tensor bloom_pool_cuda(const Tensor& rows, const Tensor& weights, const Tensor& ids,
                       const Tensor& offsets, const Tensor& tables,
                       const Tensor& per_sample_weights, int64_t first_shard, int64_t num_hashes,
                       int64_t num_weight_hashes) {
  check_bloom_weights(weights, ids, offsets, tables, num_weight_hashes);
  check_token_rows(rows, ids, offsets, tables, per_sample_weights, weights.size(0), num_hashes);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const cudaStream_t stream = current_stream(ids);
  const Batch batch(ids, offsets, tables);
  const int64_t held = weights.size(0);
  const int64_t dim = rows.size(1);
  const BloomEncoder token_rows(first_shard, held, rows_per_shard(rows, held), num_hashes,
                                kTokenPairs);
  const BloomEncoder token_weights(first_shard, held, weights.size(1), num_weight_hashes,
                                   kWeightPairs);
  Tensor pooled = torch::stable::new_zeros(weights, {batch.batch_size, batch.num_features * dim});
  if (batch.num_bags() == 0) return pooled;
  const auto launch_on = [&]<typename T>(const T* values) {
    launch(stream, batch.num_bags() * kWarp, pool_kernel<T>, batch, token_rows, token_weights,
           values, dim, weights.const_data_ptr<float>(),
           per_sample_weights.numel() > 0 ? per_sample_weights.const_data_ptr<float>() : nullptr,
           pooled.mutable_data_ptr<float>());
  };
  if (rows.scalar_type() == ScalarType::Half) {
    launch_on(static_cast<const __half*>(rows.data_ptr()));
  } else {
    launch_on(static_cast<const float*>(rows.data_ptr()));
  }
  return pooled;
}

// A warp a bag. Entry i * num_hashes + j is weight j of id i; one that sets no new bit has gradient
// 0.
template <typename T>
__global__ void weigh_backward_kernel(Batch batch, BloomEncoder token_rows,
                                      BloomEncoder token_weights, const T* __restrict__ rows,
                                      const float* __restrict__ grad, int64_t dim,
                                      const float* __restrict__ per_sample_weights,
                                      int64_t* __restrict__ out_rows,
                                      float* __restrict__ out_grads) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t bag = first_index() / kWarp; bag < batch.num_bags(); bag += index_stride() / kWarp) {
    const int64_t from = feature_major(batch, bag);
    const Table table = Table::load(batch.tables, bag % batch.num_features);
    for (int64_t i = batch.begin(from); i < batch.end(from); ++i) {
      int64_t bits[kMaxHashes];
      int size = token_rows.encode(table, batch.ids[i], bits);
      float sum = 0.0f;
      for (int j = 0; j < size; ++j) {
        for (int64_t d = lane; d < dim; d += kWarp) {
          sum += grad[bag * dim + d] * to_float(rows[bits[j] * dim + d]);
        }
      }
      for (int other = kWarp / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
      }
      if (per_sample_weights != nullptr) sum *= per_sample_weights[i];
      size = token_weights.encode(table, batch.ids[i], bits);
      if (lane >= token_weights.num_hashes) continue;
      const int64_t at = i * token_weights.num_hashes + lane;
      const int64_t bit = bits[lane < size ? lane : 0];
      out_rows[at] = bit / kWeightsPerRow;
      if (lane < size) out_grads[at * kWeightsPerRow + bit % kWeightsPerRow] = sum;
    }
  }
}

// Rows come as often as they are hit: FBGEMM's own backward sorts and adds them up, in an order
// that is always the same.
std::tuple<Tensor, Tensor> bloom_weigh_backward_cuda(
    const Tensor& grad, const Tensor& rows, const Tensor& ids, const Tensor& offsets,
    const Tensor& tables, const Tensor& per_sample_weights, int64_t first_shard,
    int64_t shards_held, int64_t weights_per_shard, int64_t num_hashes, int64_t num_weight_hashes) {
  check_bloom_backward(grad, rows, ids, offsets, tables, per_sample_weights, shards_held,
                       weights_per_shard, num_hashes, num_weight_hashes);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const cudaStream_t stream = current_stream(ids);
  const Batch batch(ids, offsets, tables);
  const BloomEncoder token_rows(first_shard, shards_held, rows_per_shard(rows, shards_held),
                                num_hashes, kTokenPairs);
  const BloomEncoder token_weights(first_shard, shards_held, weights_per_shard, num_weight_hashes,
                                   kWeightPairs);
  const int64_t size = ids.numel() * num_weight_hashes;
  Tensor out_rows = torch::stable::new_zeros(ids, {size});
  Tensor out_grads = torch::stable::new_zeros(grad, {size, kWeightsPerRow});
  if (batch.num_bags() == 0) return {out_rows, out_grads};
  const auto launch_on = [&]<typename T>(const T* values) {
    launch(stream, batch.num_bags() * kWarp, weigh_backward_kernel<T>, batch, token_rows,
           token_weights, values, grad.const_data_ptr<float>(), rows.size(1),
           per_sample_weights.numel() > 0 ? per_sample_weights.const_data_ptr<float>() : nullptr,
           out_rows.mutable_data_ptr<int64_t>(), out_grads.mutable_data_ptr<float>());
  };
  if (rows.scalar_type() == ScalarType::Half) {
    launch_on(static_cast<const __half*>(rows.data_ptr()));
  } else {
    launch_on(static_cast<const float*>(rows.data_ptr()));
  }
  return {out_rows, out_grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("bloom_rows", TORCH_BOX(&bloom_rows_cuda));
  m.impl("bloom_pool", TORCH_BOX(&bloom_pool_cuda));
  m.impl("bloom_weigh", TORCH_BOX(&bloom_weigh_cuda));
  m.impl("bloom_weigh_backward", TORCH_BOX(&bloom_weigh_backward_cuda));
}

}  // namespace torchrec_cafe
