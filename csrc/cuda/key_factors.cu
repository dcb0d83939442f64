// Learned factors of ids that a pool tracks: weights by key and shard, and what they learn from.
#include <cuda_fp16.h>

#include <tuple>

#include "bloom.h"
#include "checks.h"
#include "launch.cuh"
#include "rows.cuh"

namespace torchrec_cafe {
namespace {

// Keys, and the shards of this rank that they are in. One out of range has no weights.
struct Keys {
  const int64_t* keys;
  const int32_t* shards;
  int64_t size;
  int64_t shards_held;

  Keys(const Tensor& keys_in, const Tensor& shards_in, int64_t held)
      : keys(keys_in.const_data_ptr<int64_t>()),
        shards(shards_in.const_data_ptr<int32_t>()),
        size(keys_in.numel()),
        shards_held(held) {}

  __device__ bool has_weights(int64_t i) const { return shards[i] >= 0 && shards[i] < shards_held; }
};

BloomEncoder encoder_of(int64_t shards_held, int64_t weights_per_shard, int64_t num_hashes) {
  return {0, shards_held, weights_per_shard, static_cast<int>(num_hashes), kWeightPairs};
}

__global__ void factors_kernel(Keys keys, BloomEncoder encoder, const float* __restrict__ weights,
                               float* __restrict__ factors) {
  for (int64_t i = first_index(); i < keys.size; i += index_stride()) {
    float sum = 1.0f;
    if (keys.has_weights(i)) {
      int64_t bits[kMaxHashes];
      const int size = encoder.encode_key(keys.keys[i], keys.shards[i], bits);
      sum = 0.0f;
      for (int j = 0; j < size; ++j) sum += weights[bits[j]];
    }
    factors[i] = sum;
  }
}

Tensor key_factors_cuda(const Tensor& weights, const Tensor& keys, const Tensor& shards,
                        int64_t num_hashes) {
  check_tensor(weights, "weights", ScalarType::Float, 2);
  check_keys(keys, shards, weights.size(0), weights.size(1), num_hashes);
  check_device(weights, keys);
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  Tensor factors = torch::stable::new_empty(weights, {keys.numel()});
  if (keys.numel() == 0) return factors;
  launch(current_stream(keys), keys.numel(), factors_kernel, Keys(keys, shards, weights.size(0)),
         encoder_of(weights.size(0), weights.size(1), num_hashes), weights.const_data_ptr<float>(),
         factors.mutable_data_ptr<float>());
  return factors;
}

// A warp a bag. Equal sources lie side by side; rows and sources out of range are passed over, and
// ids without a shard, whose rows are not read.
template <typename T>
__global__ void dots_kernel(const float* __restrict__ grad, const T* __restrict__ table,
                            int64_t num_rows, int64_t dim, const int64_t* __restrict__ rows,
                            const int64_t* __restrict__ offsets, const int32_t* __restrict__ source,
                            const int32_t* __restrict__ shards, int64_t size, int64_t num_bags,
                            int64_t num_ids, float* __restrict__ dots) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t bag = first_index() / kWarp; bag < num_bags; bag += index_stride() / kWarp) {
    const int64_t begin = max(offsets[bag], int64_t{0});
    const int64_t end = min(offsets[bag + 1], size);
    float total = 0.0f;
    for (int64_t m = begin; m < end; ++m) {
      const int32_t id = source[m];
      if (id < 0 || id >= num_ids || shards[id] < 0) continue;
      const int64_t row = rows[m];
      float sum = 0.0f;
      if (row >= 0 && row < num_rows) {
        for (int64_t d = lane; d < dim; d += kWarp) {
          sum += grad[bag * dim + d] * to_float(table[row * dim + d]);
        }
      }
      for (int other = kWarp / 2; other > 0; other /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
      }
      total = m > begin && id == source[m - 1] ? total + sum : sum;
      if (lane == 0) dots[id] = total;
    }
  }
}

Tensor row_dots_cuda(const Tensor& grad, const Tensor& table, const Tensor& rows,
                     const Tensor& offsets, const Tensor& source, const Tensor& shards) {
  check_row_dots(grad, table, rows, offsets, source, shards);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t num_ids = shards.numel();
  Tensor dots = torch::stable::new_zeros(grad, {num_ids});
  if (num_bags == 0) return dots;
  const auto launch_on = [&]<typename T>(const T* values) {
    launch(current_stream(grad), num_bags * kWarp, dots_kernel<T>, grad.const_data_ptr<float>(),
           values, table.size(0), table.size(1), rows.const_data_ptr<int64_t>(),
           offsets.const_data_ptr<int64_t>(), source.const_data_ptr<int32_t>(),
           shards.const_data_ptr<int32_t>(), rows.numel(), num_bags, num_ids,
           dots.mutable_data_ptr<float>());
  };
  if (table.scalar_type() == ScalarType::Half) {
    launch_on(static_cast<const __half*>(table.data_ptr()));
  } else {
    launch_on(static_cast<const float*>(table.data_ptr()));
  }
  return dots;
}

// Entry i * num_hashes + j is weight j of key i; one that sets no new bit has gradient 0. Those of
// a key without weights have the row after the last, and gradient 0.
__global__ void factors_backward_kernel(Keys keys, BloomEncoder encoder,
                                        const float* __restrict__ grad, int64_t* __restrict__ rows,
                                        float* __restrict__ grads) {
  for (int64_t i = first_index(); i < keys.size; i += index_stride()) {
    int64_t bits[kMaxHashes];
    int size = 0;
    if (keys.has_weights(i)) {
      size = encoder.encode_key(keys.keys[i], keys.shards[i], bits);
    } else {
      bits[0] = encoder.shards_held * encoder.bits_per_shard;
    }
    for (int j = 0; j < encoder.num_hashes; ++j) {
      const int64_t at = i * encoder.num_hashes + j;
      const int64_t bit = bits[j < size ? j : 0];
      rows[at] = bit / kWeightsPerRow;
      if (j < size) grads[at * kWeightsPerRow + bit % kWeightsPerRow] = grad[i];
    }
  }
}

// Rows come as often as they are hit: FBGEMM's own backward sorts and adds them up, in an order
// that is always the same.
std::tuple<Tensor, Tensor> key_factors_backward_cuda(const Tensor& grad, const Tensor& keys,
                                                     const Tensor& shards, int64_t shards_held,
                                                     int64_t weights_per_shard,
                                                     int64_t num_hashes) {
  check_tensor(grad, "grad", ScalarType::Float, 1);
  check_keys(keys, shards, shards_held, weights_per_shard, num_hashes);
  check_device(grad, keys);
  STD_TORCH_CHECK(grad.numel() == keys.numel(), "`grad` must have as many elements as `keys`");
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const int64_t size = keys.numel() * num_hashes;
  Tensor rows = torch::stable::new_zeros(keys, {size});
  Tensor grads = torch::stable::new_zeros(grad, {size, kWeightsPerRow});
  if (size == 0) return {rows, grads};
  launch(current_stream(keys), keys.numel(), factors_backward_kernel,
         Keys(keys, shards, shards_held), encoder_of(shards_held, weights_per_shard, num_hashes),
         grad.const_data_ptr<float>(), rows.mutable_data_ptr<int64_t>(),
         grads.mutable_data_ptr<float>());
  return {rows, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("key_factors", TORCH_BOX(&key_factors_cuda));
  m.impl("key_factors_backward", TORCH_BOX(&key_factors_backward_cuda));
  m.impl("row_dots", TORCH_BOX(&row_dots_cuda));
}

}  // namespace torchrec_cafe
