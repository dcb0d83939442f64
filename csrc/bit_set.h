// A set of small numbers that is read in ascending order. Torch-free.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace torchrec_cafe {

// Numbers in [0, size). Reading takes time in proportion to what is in it, and to size / 4096.
class BitSet {
 public:
  explicit BitSet(int64_t size) : words_((size + 63) / 64), summary_((words_.size() + 63) / 64) {}

  void insert(int64_t number) {
    words_[number / 64] |= uint64_t{1} << number % 64;
    summary_[number / 4096] |= uint64_t{1} << number / 64 % 64;
  }

  // Calls visit(number) for each, in ascending order, and empties the set.
  template <typename Visit>
  void drain(const Visit& visit) {
    for (size_t i = 0; i < summary_.size(); ++i) {
      for (; summary_[i] != 0; summary_[i] &= summary_[i] - 1) {
        const size_t at = 64 * i + std::countr_zero(summary_[i]);
        for (; words_[at] != 0; words_[at] &= words_[at] - 1) {
          visit(static_cast<int64_t>(64 * at + std::countr_zero(words_[at])));
        }
      }
    }
  }

 private:
  std::vector<uint64_t> words_;
  std::vector<uint64_t> summary_;  // which words are not zero
};

}  // namespace torchrec_cafe
