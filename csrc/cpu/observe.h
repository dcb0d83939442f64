// Learning on a CPU, as the operators share it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cpu/kernels.h"

namespace torchrec_cafe {

// Occurrences [begin, end) of a batch.
struct Range {
  int64_t begin;
  int64_t end;
};

// What `observe` does to checked tensors, with the occurrences of some ranges.
void observe_checked(const torch::stable::Tensor& keys, const torch::stable::Tensor& shards,
                     const float* importance, const std::vector<Range>& ranges,
                     const torch::stable::Tensor& buckets, const torch::stable::Tensor& inflation,
                     const torch::stable::Tensor& counters, double growth);

// Raises if one of the shards [begin, end) of a tensor is out of range.
void check_shards(const torch::stable::Tensor& shards, int64_t begin, int64_t end,
                  int64_t num_shards);

}  // namespace torchrec_cafe
