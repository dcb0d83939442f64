// Learned factors of ids that a pool tracks: weights by key and shard, and what they learn from.
#include <cuda_fp16.h>

#include "checks.h"
#include "factor_gradients.cuh"
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

  __device__ bool has_weights(int64_t i) const {
    return i >= 0 && i < size && shards[i] >= 0 && shards[i] < shards_held;
  }
};

__global__ void factors_kernel(Keys keys, LineEncoder encoder, const int32_t* __restrict__ source,
                               int64_t size, const float* __restrict__ weights,
                               float* __restrict__ factors) {
  for (int64_t i = first_index(); i < size; i += index_stride()) {
    const int64_t id = source == nullptr ? i : source[i];
    float sum = 1.0f;
    if (keys.has_weights(id)) {
      const uint64_t hash = encoder.hash(keys.keys[id], 0);
      const float* line = weights + encoder.line(hash, keys.shards[id]) * kLineWeights;
      sum = sum_of_line(line, encoder.weights(keys.keys[id], hash));
    }
    factors[i] = sum;
  }
}

Tensor key_factors_cuda(const Tensor& weights, const Tensor& keys, const Tensor& shards,
                        int64_t num_hashes, std::optional<Tensor> source) {
  check_key_factors(weights, keys, shards, num_hashes, source);
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const int64_t size = source ? source->numel() : keys.numel();
  Tensor factors = torch::stable::new_empty(weights, {size});
  if (size == 0) return factors;
  launch(current_stream(keys), size, factors_kernel, Keys(keys, shards, weights.size(0)),
         LineEncoder(weights.size(0), weights.size(1), static_cast<int>(num_hashes)),
         source ? source->const_data_ptr<int32_t>() : nullptr, size,
         weights.const_data_ptr<float>(), factors.mutable_data_ptr<float>());
  return factors;
}

// Rows of bags, and what they add up to and are scaled by; as ScaledRows on a CPU.
template <typename T>
struct ScaledRows {
  const float* grad;
  const T* table;
  int64_t num_rows;
  int64_t dim;
  const int64_t* rows;
  const int64_t* offsets;
  const int32_t* source;
  const float* given;  // or null
  const int64_t* features;
  int64_t num_features;
  int64_t num_bags;
  int64_t size;
};

// A warp a row. What teaches nothing has the line after the last, and gradient 0.
template <typename T>
__global__ void gradients_kernel(ScaledRows<T> in, Keys keys, LineEncoder encoder,
                                 int64_t* __restrict__ lines, float* __restrict__ grads) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_index() / kWarp; m < in.size; m += index_stride() / kWarp) {
    const int64_t bag = part_of(in.offsets, in.num_bags, m);
    const int64_t id = in.source[m], row = in.rows[m];
    const bool learns = in.features[bag % in.num_features] >= 0 && keys.has_weights(id) &&
                        row >= 0 && row < in.num_rows;
    int64_t line = encoder.num_lines();
    uint32_t mask = 0;
    float sum = 0.0f;
    if (learns) {
      const uint64_t hash = encoder.hash(keys.keys[id], 0);
      line = encoder.line(hash, keys.shards[id]);
      mask = encoder.weights(keys.keys[id], hash);
      for (int64_t d = lane; d < in.dim; d += kWarp) {
        sum += in.grad[bag * in.dim + d] * to_float(in.table[row * in.dim + d]);
      }
    }
    for (int other = kWarp / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    if (learns && in.given != nullptr) sum *= in.given[id];
    if (lane == 0) lines[m] = line;
    if (lane < kLineWeights) {
      grads[m * kLineWeights + lane] = (mask >> lane & 1u) != 0 ? sum : 0.0f;
    }
  }
}

}  // namespace

// Lines come as often as they are hit: FBGEMM's own backward sorts and adds them up, in an order
// that is always the same.
std::tuple<Tensor, Tensor> factor_gradients_cuda(const Tensor& grad, const Tensor& table,
                                                 const Tensor& rows, const Tensor& offsets,
                                                 const Tensor& source, const Tensor& keys,
                                                 const Tensor& shards, std::optional<Tensor> given,
                                                 const Tensor& features, int64_t shards_held,
                                                 int64_t weights_per_shard, int64_t num_hashes) {
  check_factor_gradients(grad, table, rows, offsets, source, keys, shards, given, features);
  check_keys(keys, shards, shards_held, weights_per_shard, num_hashes);
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const int64_t size = rows.numel(), num_bags = offsets.numel() - 1;
  Tensor lines = torch::stable::new_empty(rows, {size});
  Tensor grads = torch::stable::new_empty(grad, {size, kLineWeights});
  if (size == 0) return {lines, grads};
  STD_TORCH_CHECK(num_bags > 0, "`rows` must be empty without a bag");
  const auto launch_on = [&]<typename T>(const T* values) {
    const ScaledRows<T> in{grad.const_data_ptr<float>(),
                           values,
                           table.size(0),
                           table.size(1),
                           rows.const_data_ptr<int64_t>(),
                           offsets.const_data_ptr<int64_t>(),
                           source.const_data_ptr<int32_t>(),
                           given ? given->const_data_ptr<float>() : nullptr,
                           features.const_data_ptr<int64_t>(),
                           features.numel(),
                           num_bags,
                           size};
    launch(current_stream(grad), size * kWarp, gradients_kernel<T>, in,
           Keys(keys, shards, shards_held),
           LineEncoder(shards_held, weights_per_shard, static_cast<int>(num_hashes)),
           lines.mutable_data_ptr<int64_t>(), grads.mutable_data_ptr<float>());
  };
  if (table.scalar_type() == ScalarType::Half) {
    launch_on(static_cast<const __half*>(table.data_ptr()));
  } else {
    launch_on(static_cast<const float*>(table.data_ptr()));
  }
  return {lines, grads};
}

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("factor_gradients", TORCH_BOX(&factor_gradients_cuda));
  m.impl("key_factors", TORCH_BOX(&key_factors_cuda));
}

}  // namespace torchrec_cafe
