// Gradients of weights, added up by rows of FBGEMM.
#pragma once

#include <algorithm>
#include <bit>
#include <tuple>
#include <vector>

#include "cpu/row_places.h"
#include "cpu/tensors.h"

namespace torchrec_cafe {

// The sums of the rows that are hit, in the order in which they are first hit; what is added to a
// row is added in the order in which it comes. A row has kPerRow weights.
template <int kPerRow>
class WeightSums {
 public:
  // At most `most` times something is added.
  WeightSums(int64_t num_rows, int64_t most)
      : rows_(empty_cpu<1>({std::min(num_rows, most)}, aoti_torch_dtype_int64())),
        sums_(empty_cpu<2>({std::min(num_rows, most), kPerRow}, aoti_torch_dtype_float32())),
        slots_(2 * std::bit_ceil(static_cast<uint64_t>(std::min(num_rows, most)) + 1),
               RowPlaces::kFree),
        places_{slots_.data(), slots_.size() - 1, rows_.template mutable_data_ptr<int64_t>(), 0} {}

  // Adds a gradient to that of a weight of a row.
  void add(int32_t row, int weight, float gradient) {
    bool is_new;
    float* of_row = sums_.template mutable_data_ptr<float>() + places_.find(row, is_new) * kPerRow;
    if (is_new) std::fill_n(of_row, kPerRow, 0.0f);
    of_row[weight] += gradient;
  }

  // The rows that were added to, and their gradients, [rows, kPerRow].
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> by_row() {
    return {torch::stable::narrow(rows_, 0, 0, places_.size),
            torch::stable::narrow(sums_, 0, 0, places_.size)};
  }

 private:
  torch::stable::Tensor rows_;
  torch::stable::Tensor sums_;
  std::vector<RowPlaces::Slot> slots_;
  RowPlaces places_;
};

}  // namespace torchrec_cafe
