// Learned factors of ids that a pool tracks, from weights by key and shard.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <optional>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/tensors.h"
#include "factor_lines.h"

namespace torchrec_cafe {
namespace {

// Below these many a thread, starting the threads costs more than they save.
constexpr int64_t kKeysPerThread = 2048;

void check_shards(const int32_t* shards, int64_t size, int64_t shards_held) {
  STD_TORCH_CHECK(kernels().shards_fit(shards, size, shards_held), "`shards` must be -1 or in [0, ",
                  shards_held, ")");
}

Tensor key_factors_cpu(const Tensor& weights, const Tensor& keys, const Tensor& shards,
                       int64_t num_hashes, std::optional<Tensor> source) {
  check_key_factors(weights, keys, shards, num_hashes, source);
  const int64_t num_keys = keys.numel();
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int32_t* shard = shards.const_data_ptr<int32_t>();
  check_shards(shard, num_keys, weights.size(0));
  const LineEncoder encoder(weights.size(0), weights.size(1), static_cast<int>(num_hashes));
  Tensor of_keys = empty_cpu<1>({num_keys}, aoti_torch_dtype_float32());
  float* all = of_keys.mutable_data_ptr<float>();
  const float* weight = weights.const_data_ptr<float>();
  torch::stable::parallel_for(0, num_keys, kKeysPerThread, [&](int64_t begin, int64_t end) {
    kernels().key_factors(encoder, key + begin, shard + begin, end - begin, weight, all + begin);
  });
  if (!source) return of_keys;
  Tensor factors = empty_cpu<1>({source->numel()}, aoti_torch_dtype_float32());
  const int32_t* at = source->const_data_ptr<int32_t>();
  float* out = factors.mutable_data_ptr<float>();
  std::atomic<bool> fit{true};
  torch::stable::parallel_for(0, source->numel(), kKeysPerThread, [&](int64_t begin, int64_t end) {
    if (!kernels().gather(all, num_keys, at + begin, end - begin, out + begin)) fit = false;
  });
  STD_TORCH_CHECK(fit, "`source` must be in [0, ", num_keys, ")");
  return factors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("key_factors", TORCH_BOX(&key_factors_cpu));
}

}  // namespace torchrec_cafe
