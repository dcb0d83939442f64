// Gradients of weights, added up and given by rows of FBGEMM.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "bloom.h"
#include "cpu/tensors.h"

namespace torchrec_cafe {

// They are added up where they lie, in arrays as long as the weights; but if a batch hits few of
// them, they are noted and sorted, for clearing and reading long arrays would take longer. Both
// ways add them in the order in which they come.
class WeightSums {
 public:
  // At most `most` gradients are added.
  WeightSums(int64_t num_weights, int64_t most)
      : num_rows_(num_weights / kWeightsPerRow), in_place_(num_weights <= kWeightsPerNote * most) {
    if (in_place_) {
      sums_.assign(num_weights, 0.0f);
      touched_.assign(num_rows_, 0);
    } else {
      notes_.reserve(most);
    }
  }

  // Asks for where gradients will be added; inlined for sure, as in row_kernel.h.
  __attribute__((always_inline)) void ask_for(const BloomBits& bits, int size,
                                              int num_hashes) const {
    if (!in_place_) return;
    for (int h = 0; h < num_hashes; ++h) {
      for (int i = 0; i < size; ++i) {
        __builtin_prefetch(sums_.data() + std::max(bits.at[h][i], 0), 1);
      }
    }
  }

  // Adds the gradient of an id's factor to that of each of its weights.
  void add(const BloomBits& bits, int place, int num_hashes, float gradient) {
    for (int h = 0; h < num_hashes; ++h) {
      const int32_t bit = bits.at[h][place];
      if (bit < 0) continue;
      if (in_place_) {
        sums_[bit] += gradient;
        touched_[bit / kWeightsPerRow] = 1;
      } else {
        notes_.push_back({bit, gradient});
      }
    }
  }

  // The rows that were added to, ascending, and their gradients, [rows, kWeightsPerRow].
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> by_row() {
    return in_place_ ? sums_by_row() : notes_by_row();
  }

 private:
  struct Note {
    int32_t bit;
    float gradient;

    int64_t row() const { return bit / kWeightsPerRow; }
  };

  // Sorting a note takes about as long as clearing and reading so many weights.
  static constexpr int64_t kWeightsPerNote = 16;
  static constexpr int kDigitBits = 10;

  static std::tuple<torch::stable::Tensor, torch::stable::Tensor> empty_rows(int64_t size) {
    return {empty_cpu<1>({size}, aoti_torch_dtype_int64()),
            empty_cpu<2>({size, kWeightsPerRow}, aoti_torch_dtype_float32())};
  }

  std::tuple<torch::stable::Tensor, torch::stable::Tensor> sums_by_row() {
    const int64_t size = std::count(touched_.begin(), touched_.end(), 1);
    auto result = empty_rows(size);
    int64_t* rows = std::get<0>(result).mutable_data_ptr<int64_t>();
    float* grads = std::get<1>(result).mutable_data_ptr<float>();
    // No condition: whether a row was touched is a coin toss for the branch predictor.
    for (int64_t row = 0, at = 0; at < size; ++row) {
      rows[at] = row;
      std::copy_n(sums_.data() + row * kWeightsPerRow, kWeightsPerRow, grads + at * kWeightsPerRow);
      at += touched_[row];
    }
    return result;
  }

  std::tuple<torch::stable::Tensor, torch::stable::Tensor> notes_by_row() {
    sort_notes();
    int64_t size = 0;
    for (size_t i = 0; i < notes_.size(); ++i) {
      size += i == 0 || notes_[i].row() != notes_[i - 1].row();
    }
    auto result = empty_rows(size);
    int64_t* rows = std::get<0>(result).mutable_data_ptr<int64_t>();
    float* grads = std::get<1>(result).mutable_data_ptr<float>();
    std::fill_n(grads, size * kWeightsPerRow, 0.0f);
    int64_t at = -1;
    for (const Note& note : notes_) {
      if (at < 0 || rows[at] != note.row()) rows[++at] = note.row();
      grads[at * kWeightsPerRow + note.bit % kWeightsPerRow] += note.gradient;
    }
    return result;
  }

  // By rows, digit by digit from the lowest: what is in one row stays in order.
  void sort_notes() {
    std::vector<Note> sorted(notes_.size());
    for (int shift = 0; ((num_rows_ - 1) >> shift) > 0; shift += kDigitBits) {
      const auto digit = [shift](const Note& note) {
        return (note.row() >> shift) & ((1 << kDigitBits) - 1);
      };
      std::array<int64_t, (1 << kDigitBits) + 1> starts{};
      for (const Note& note : notes_) ++starts[digit(note) + 1];
      for (size_t d = 1; d < starts.size(); ++d) starts[d] += starts[d - 1];
      for (const Note& note : notes_) sorted[starts[digit(note)]++] = note;
      notes_.swap(sorted);
    }
  }

  int64_t num_rows_;
  bool in_place_;
  std::vector<float> sums_;
  std::vector<uint8_t> touched_;  // of each row
  std::vector<Note> notes_;
};

}  // namespace torchrec_cafe
