#include "checks.h"
#include "factor_gradients.cuh"
#include "importance.h"
#include "launch.cuh"
#include "observe.cuh"

namespace torchrec_cafe {
namespace {

constexpr int kLanes = 4;  // of l2_norm

// Four threads a bag, one for each lane of l2_norm.
__global__ void bag_norms_kernel(const float* __restrict__ grad, int64_t num_bags, int64_t dim,
                                 float* __restrict__ norms) {
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = index_stride() / kLanes;
  // Whole warps stay together for the shuffles.
  for (int64_t first = first_index() / kWarp * (kWarp / kLanes); first < num_bags;
       first += stride) {
    const int64_t bag = first + threadIdx.x % kWarp / kLanes;
    double sum = 0.0;
    if (bag < num_bags) {
      for (int64_t d = lane; d < dim; d += kLanes) {
        const auto x = static_cast<double>(grad[bag * dim + d]);
        sum += x * x;
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane == 0 && bag < num_bags) norms[bag] = static_cast<float>(sqrt(sum));
  }
}

// One thread for every feature of a block of samples: sums have the order of the CPU's.
__global__ void block_sums_kernel(const float* __restrict__ norms, int64_t num_samples,
                                  int64_t num_features, NormSum* __restrict__ sums) {
  const int64_t num_blocks = (num_samples + kNormBlock - 1) / kNormBlock;
  for (int64_t i = first_index(); i < num_blocks * num_features; i += index_stride()) {
    const int64_t first = i / num_features * kNormBlock;
    const int64_t last = min(first + kNormBlock, num_samples);
    NormSum sum;
    for (int64_t b = first; b < last; ++b) sum.add(norms[b * num_features + i % num_features]);
    sums[i] = sum;
  }
}

// One thread a table.
__global__ void update_means_kernel(const NormSum* __restrict__ blocks, int64_t num_blocks,
                                    const int64_t* __restrict__ features, int64_t num_features,
                                    NormSum* norms, int64_t num_shards, int64_t num_tables,
                                    double decay, float* __restrict__ scales) {
  for (int64_t t = first_index(); t < num_tables; t += index_stride()) {
    NormSum seen;
    for (int64_t f = 0; f < num_features; ++f) {
      if (features[f] != t) continue;
      NormSum sum;
      for (int64_t block = 0; block < num_blocks; ++block) {
        sum.add(blocks[block * num_features + f]);
      }
      seen.add(sum);
    }
    NormSum running = norms[t];
    running.decay(decay);
    running.add(seen);
    for (int64_t s = 0; s < num_shards; ++s) norms[s * num_tables + t] = running;
    for (int64_t f = 0; f < num_features; ++f) {
      if (features[f] == t) scales[f] = running.scale();
    }
  }
}

// One thread for every bag of a tracked feature. Occurrences of no such bag are not tracked.
__global__ void weigh_kernel(const float* __restrict__ norms, const float* __restrict__ scales,
                             const int64_t* __restrict__ features, int64_t num_features,
                             int64_t num_tables, const int64_t* __restrict__ offsets,
                             int64_t num_samples, const int32_t* __restrict__ shards,
                             const float* __restrict__ weights, int64_t size,
                             float* __restrict__ importance, int32_t* __restrict__ tracked) {
  for (int64_t bag = first_index(); bag < num_features * num_samples; bag += index_stride()) {
    const int64_t feature = bag / num_samples;
    if (features[feature] < 0 || features[feature] >= num_tables) continue;
    const float norm = norms[bag % num_samples * num_features + feature] * scales[feature];
    const int64_t end = min(offsets[bag + 1], size);
    for (int64_t i = max(offsets[bag], int64_t{0}); i < end; ++i) {
      importance[i] = weights == nullptr ? norm : norm * fabsf(weights[i]);
      tracked[i] = shards[i];
    }
  }
}

void learn_cuda(const Tensor& grad, const Tensor& offsets, const Tensor& keys, const Tensor& shards,
                std::optional<Tensor> weights, const Tensor& features, const Tensor& norms,
                const Tensor& buckets, const Tensor& inflation, const Tensor& counters,
                double decay, double growth) {
  check_learn(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters);
  if (norms.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad);
  const int64_t num_features = features.numel();
  const int64_t num_bags = grad.size(0);
  const int64_t num_samples = num_bags / num_features;
  const int64_t num_blocks = (num_samples + kNormBlock - 1) / kNormBlock;
  const Tensor norm = torch::stable::new_empty(grad, {num_bags});
  const Tensor sums = torch::stable::new_empty(norms, {num_blocks * num_features, 2});
  const Tensor scales = torch::stable::new_zeros(grad, {num_features});
  const Tensor importance = torch::stable::new_empty(grad, {keys.numel()});
  auto* norm_out = static_cast<float*>(norm.data_ptr());
  auto* scale_out = static_cast<float*>(scales.data_ptr());
  if (num_bags > 0) {
    launch(stream, num_bags * kLanes, bag_norms_kernel, grad.const_data_ptr<float>(), num_bags,
           grad.size(1), norm_out);
    launch(stream, num_blocks * num_features, block_sums_kernel, norm_out, num_samples,
           num_features, static_cast<NormSum*>(sums.data_ptr()));
  }
  if (norms.size(1) > 0) {
    launch(stream, norms.size(1), update_means_kernel, static_cast<const NormSum*>(sums.data_ptr()),
           num_blocks, features.const_data_ptr<int64_t>(), num_features,
           static_cast<NormSum*>(norms.data_ptr()), norms.size(0), norms.size(1), decay, scale_out);
  }
  const Tensor tracked = torch::stable::new_empty(shards, {keys.numel()});
  torch::stable::fill_(tracked, -1);
  if (keys.numel() > 0 && num_bags > 0) {
    launch(stream, num_bags, weigh_kernel, norm_out, scale_out, features.const_data_ptr<int64_t>(),
           num_features, norms.size(1), offsets.const_data_ptr<int64_t>(), num_samples,
           shards.const_data_ptr<int32_t>(), weights ? weights->const_data_ptr<float>() : nullptr,
           keys.numel(), static_cast<float*>(importance.data_ptr()),
           static_cast<int32_t*>(tracked.data_ptr()));
  }
  observe_checked_cuda(keys, tracked, importance, buckets, inflation, counters, growth);
}

// Here the gradient is read twice: a warp a row and four threads a bag keep the device busy, and
// one kernel of both would not.
std::tuple<Tensor, Tensor> learn_scaled_cuda(
    const Tensor& grad, const Tensor& offsets, const Tensor& keys, const Tensor& shards,
    std::optional<Tensor> weights, const Tensor& features, const Tensor& norms,
    const Tensor& buckets, const Tensor& inflation, const Tensor& counters, double decay,
    double growth, const Tensor& table, const Tensor& rows, const Tensor& bag_offsets,
    const Tensor& source, const Tensor& taught, int64_t weights_per_shard, int64_t num_hashes) {
  check_learn(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters);
  check_apart_from_learned(norms, buckets, inflation, counters, table, rows, bag_offsets, source,
                           taught);
  std::tuple<Tensor, Tensor> gradients =
      factor_gradients_cuda(grad, table, rows, bag_offsets, source, keys, taught, weights, features,
                            norms.size(0), weights_per_shard, num_hashes);
  learn_cuda(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters,
             decay, growth);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("learn", TORCH_BOX(&learn_cuda));
  m.impl("learn_scaled", TORCH_BOX(&learn_scaled_cuda));
}

}  // namespace torchrec_cafe
