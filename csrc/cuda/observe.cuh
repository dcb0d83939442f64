// Learning on a GPU, as the operators share it.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace torchrec_cafe {

// What `observe` does to checked tensors.
void observe_checked_cuda(const torch::stable::Tensor& keys, const torch::stable::Tensor& shards,
                          const torch::stable::Tensor& importance,
                          const torch::stable::Tensor& buckets,
                          const torch::stable::Tensor& inflation,
                          const torch::stable::Tensor& counters, double growth);

}  // namespace torchrec_cafe
