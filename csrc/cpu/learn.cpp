#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/observe.h"

namespace torchrec_cafe {
namespace {

// Below this many numbers per thread, starting the threads costs more than they save.
constexpr int64_t kNumbersPerThread = 65536;

int64_t per_thread(int64_t numbers_per_item) {
  return std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers_per_item));
}

// Adds each table's norms of this batch to its running mean, and returns what to multiply the norms
// of each feature by.
std::vector<float> update_means(const std::vector<NormSum>& blocks, const int64_t* features,
                                int64_t num_features, NormSum* norms, int64_t num_shards,
                                int64_t num_tables, double decay) {
  const int64_t num_blocks = static_cast<int64_t>(blocks.size()) / num_features;
  std::vector<NormSum> seen(num_tables);
  for (int64_t f = 0; f < num_features; ++f) {
    if (features[f] < 0) continue;
    NormSum sum;
    for (int64_t block = 0; block < num_blocks; ++block) sum.add(blocks[block * num_features + f]);
    seen[features[f]].add(sum);
  }
  for (int64_t t = 0; t < num_tables; ++t) {
    NormSum running = norms[t];
    running.decay(decay);
    running.add(seen[t]);
    for (int64_t s = 0; s < num_shards; ++s) norms[s * num_tables + t] = running;
  }
  std::vector<float> scales(num_features, 0.0f);
  for (int64_t f = 0; f < num_features; ++f) {
    if (features[f] >= 0) scales[f] = norms[features[f]].scale();
  }
  return scales;
}

void check_values(const Tensor& bags, const Tensor& shards, const Tensor& features,
                  int64_t num_bags, int64_t num_shards, int64_t num_tables) {
  STD_TORCH_CHECK(kernels().bags_fit(bags.const_data_ptr<int32_t>(), bags.numel(), num_bags),
                  "`bags` must be in [0, ", num_bags, ")");
  const int64_t* table = features.const_data_ptr<int64_t>();
  for (int64_t f = 0; f < features.numel(); ++f) {
    STD_TORCH_CHECK(table[f] >= -1 && table[f] < num_tables, "`features` must be in [-1, ",
                    num_tables, "), got ", table[f]);
  }
  check_shards(shards, num_shards);
}

void learn_cpu(const Tensor& grad, const Tensor& bags, const Tensor& keys, const Tensor& shards,
               const Tensor& weights, const Tensor& features, const Tensor& norms,
               const Tensor& buckets, const Tensor& inflation, const Tensor& counters, double decay,
               double growth) {
  check_learn(grad, bags, keys, shards, weights, features, norms, buckets, inflation, counters);
  const int64_t num_features = features.numel();
  const int64_t num_bags = grad.size(0);
  const int64_t num_samples = num_bags / num_features;
  const int64_t dim = grad.size(1);
  const int64_t num_shards = norms.size(0);
  check_values(bags, shards, features, num_bags, num_shards, norms.size(1));
  if (num_shards == 0) return;

  const int64_t num_blocks = (num_samples + kNormBlock - 1) / kNormBlock;
  std::vector<NormSum> sums(num_blocks * num_features);
  std::vector<float> norm(num_bags);
  const float* gradient = grad.const_data_ptr<float>();
  torch::stable::parallel_for(
      0, num_blocks, per_thread(kNormBlock * num_features * dim), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kNormBlock;
          const int64_t size = std::min(kNormBlock, num_samples - first);
          kernels().bag_norms(gradient + first * num_features * dim, dim, num_features, size,
                              norm.data() + first * num_features,
                              sums.data() + block * num_features);
        }
      });
  const std::vector<float> scales =
      update_means(sums, features.const_data_ptr<int64_t>(), num_features,
                   static_cast<NormSum*>(norms.data_ptr()), num_shards, norms.size(1), decay);
  torch::stable::parallel_for(0, num_samples, per_thread(num_features),
                              [&](int64_t begin, int64_t end) {
                                kernels().scale_norms(scales.data(), num_features, end - begin,
                                                      norm.data() + begin * num_features);
                              });
  std::vector<float> importance(bags.numel());
  const float* weight = weights.numel() > 0 ? weights.const_data_ptr<float>() : nullptr;
  torch::stable::parallel_for(0, bags.numel(), kNumbersPerThread, [&](int64_t begin, int64_t end) {
    kernels().weigh(norm.data(), bags.const_data_ptr<int32_t>() + begin,
                    weight == nullptr ? nullptr : weight + begin, end - begin,
                    importance.data() + begin);
  });
  observe_checked(keys, shards, importance.data(), buckets, inflation, counters, growth);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("learn", TORCH_BOX(&learn_cpu)); }

}  // namespace torchrec_cafe
