// Learning on a CPU, as the operators share it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"

namespace torchrec_cafe {

// What `observe` does to checked tensors.
void observe_checked(const torch::stable::Tensor& keys, const torch::stable::Tensor& shards,
                     const float* importance, const torch::stable::Tensor& buckets,
                     const torch::stable::Tensor& inflation, const torch::stable::Tensor& counters,
                     double growth);

// Raises if a shard is out of range.
void check_shards(const torch::stable::Tensor& shards, int64_t num_shards);

}  // namespace torchrec_cafe
