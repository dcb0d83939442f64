// Learned factors of ids that a pool tracks: weights by key and shard, and what they learn from.
#include <cuda_fp16.h>

#include <tuple>

#include "checks.h"
#include "factor_lines.h"
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

__global__ void factors_kernel(Keys keys, LineEncoder encoder, const float* __restrict__ weights,
                               float* __restrict__ factors) {
  for (int64_t i = first_index(); i < keys.size; i += index_stride()) {
    float sum = 1.0f;
    if (keys.has_weights(i)) {
      const uint64_t hash = encoder.hash(keys.keys[i], 0);
      const float* line = weights + encoder.line(hash, keys.shards[i]) * kLineWeights;
      sum = sum_of_line(line, encoder.weights(keys.keys[i], hash));
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
         LineEncoder(weights.size(0), weights.size(1), static_cast<int>(num_hashes)),
         weights.const_data_ptr<float>(), factors.mutable_data_ptr<float>());
  return factors;
}

// A warp a bag. Equal sources lie side by side; rows and sources out of range are passed over, and
// ids without a shard, whose rows are not read.
template <typename T>
__global__ void dots_kernel(const float* __restrict__ grad, const T* __restrict__ table,
                            int64_t num_rows, int64_t dim, const int64_t* __restrict__ rows,
                            const int64_t* __restrict__ offsets, const int32_t* __restrict__ source,
                            const int32_t* __restrict__ shards,
                            const int64_t* __restrict__ features, int64_t num_features,
                            int64_t size, int64_t num_bags, int64_t num_ids,
                            float* __restrict__ dots) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t bag = first_index() / kWarp; bag < num_bags; bag += index_stride() / kWarp) {
    if (features[bag % num_features] < 0) continue;
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
                     const Tensor& offsets, const Tensor& source, const Tensor& shards,
                     const Tensor& features) {
  check_row_dots(grad, table, rows, offsets, source, shards, features);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t num_ids = shards.numel();
  Tensor dots = torch::stable::new_zeros(grad, {num_ids});
  if (num_bags == 0) return dots;
  const auto launch_on = [&]<typename T>(const T* values) {
    launch(current_stream(grad), num_bags * kWarp, dots_kernel<T>, grad.const_data_ptr<float>(),
           values, table.size(0), table.size(1), rows.const_data_ptr<int64_t>(),
           offsets.const_data_ptr<int64_t>(), source.const_data_ptr<int32_t>(),
           shards.const_data_ptr<int32_t>(), features.const_data_ptr<int64_t>(), features.numel(),
           rows.numel(), num_bags, num_ids, dots.mutable_data_ptr<float>());
  };
  if (table.scalar_type() == ScalarType::Half) {
    launch_on(static_cast<const __half*>(table.data_ptr()));
  } else {
    launch_on(static_cast<const float*>(table.data_ptr()));
  }
  return dots;
}

// A key without weights has the line after the last, and gradient 0.
__global__ void factors_backward_kernel(Keys keys, LineEncoder encoder,
                                        const float* __restrict__ grad, int64_t* __restrict__ lines,
                                        float* __restrict__ grads) {
  for (int64_t i = first_index(); i < keys.size; i += index_stride()) {
    int64_t line = encoder.num_lines();
    uint32_t mask = 0;
    if (keys.has_weights(i)) {
      const uint64_t hash = encoder.hash(keys.keys[i], 0);
      line = encoder.line(hash, keys.shards[i]);
      mask = encoder.weights(keys.keys[i], hash);
    }
    lines[i] = line;
    for (int j = 0; j < kLineWeights; ++j) {
      grads[i * kLineWeights + j] = (mask >> j & 1u) != 0 ? grad[i] : 0.0f;
    }
  }
}

// Lines come as often as they are hit: FBGEMM's own backward sorts and adds them up, in an order
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
  const int64_t size = keys.numel();
  Tensor lines = torch::stable::new_empty(keys, {size});
  Tensor grads = torch::stable::new_empty(grad, {size, kLineWeights});
  if (size == 0) return {lines, grads};
  launch(current_stream(keys), size, factors_backward_kernel, Keys(keys, shards, shards_held),
         LineEncoder(shards_held, weights_per_shard, static_cast<int>(num_hashes)),
         grad.const_data_ptr<float>(), lines.mutable_data_ptr<int64_t>(),
         grads.mutable_data_ptr<float>());
  return {lines, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("key_factors", TORCH_BOX(&key_factors_cuda));
  m.impl("key_factors_backward", TORCH_BOX(&key_factors_backward_cuda));
  m.impl("row_dots", TORCH_BOX(&row_dots_cuda));
}

}  // namespace torchrec_cafe
