// Gradients of weights, added up and given by rows of FBGEMM.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "bloom.h"
#include "cpu/tensors.h"

namespace torchrec_cafe {

class WeightSums {
 public:
  explicit WeightSums(int64_t num_weights)
      : sums_(num_weights, 0.0f), touched_(num_weights / kWeightsPerRow, 0) {}

  // Adds the gradient of an id's factor to that of each of its weights.
  void add(const BloomBits& bits, int place, int num_hashes, float gradient) {
    for (int h = 0; h < num_hashes; ++h) {
      const int32_t bit = bits.at[h][place];
      if (bit < 0) continue;
      sums_[bit] += gradient;
      touched_[bit / kWeightsPerRow] = 1;
    }
  }

  // The rows that were added to, ascending, and their gradients, [rows, kWeightsPerRow].
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> by_row() const {
    const int64_t size = std::count(touched_.begin(), touched_.end(), 1);
    torch::stable::Tensor rows = empty_cpu<1>({size}, aoti_torch_dtype_int64());
    torch::stable::Tensor grads = empty_cpu<2>({size, kWeightsPerRow}, aoti_torch_dtype_float32());
    int64_t* next_row = rows.mutable_data_ptr<int64_t>();
    float* next_grad = grads.mutable_data_ptr<float>();
    for (size_t row = 0; row < touched_.size(); ++row) {
      if (touched_[row] == 0) continue;
      *next_row++ = static_cast<int64_t>(row);
      next_grad = std::copy_n(sums_.data() + row * kWeightsPerRow, kWeightsPerRow, next_grad);
    }
    return {rows, grads};
  }

 private:
  std::vector<float> sums_;
  std::vector<uint8_t> touched_;  // of each row
};

}  // namespace torchrec_cafe
