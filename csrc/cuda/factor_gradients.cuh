// Gradients of the weights of factors on a GPU, as the operators share them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace torchrec_cafe {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> factor_gradients_cuda(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& table,
    const torch::stable::Tensor& rows, const torch::stable::Tensor& offsets,
    const torch::stable::Tensor& source, const torch::stable::Tensor& keys,
    const torch::stable::Tensor& shards, std::optional<torch::stable::Tensor> given,
    const torch::stable::Tensor& features, int64_t shards_held, int64_t weights_per_shard,
    int64_t num_hashes);

}  // namespace torchrec_cafe
