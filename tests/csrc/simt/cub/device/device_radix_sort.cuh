// Stands in for CUB's header of this name: what our sources call of it.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "storage.h"

namespace cub {

struct DeviceRadixSort {
  // Stable; looks at bits [begin_bit, end_bit) of the keys only, as CUB does.
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* storage, size_t& bytes, const Key* keys, Key* sorted_keys,
                               const Value* values, Value* sorted_values, int size, int begin_bit,
                               int end_bit, cudaStream_t stream) {
    return with_storage(storage, bytes, stream, [&] {
      const std::vector<int> order = sorted_order(keys, size, begin_bit, end_bit);
      for (int i = 0; i < size; ++i) {
        sorted_keys[i] = keys[order[i]];
        sorted_values[i] = values[order[i]];
      }
    });
  }

  template <typename Key>
  static cudaError_t SortKeys(void* storage, size_t& bytes, const Key* keys, Key* sorted_keys,
                              int size, int begin_bit, int end_bit, cudaStream_t stream) {
    return with_storage(storage, bytes, stream, [&] {
      const std::vector<int> order = sorted_order(keys, size, begin_bit, end_bit);
      for (int i = 0; i < size; ++i) sorted_keys[i] = keys[order[i]];
    });
  }

 private:
  template <typename Key>
  static std::vector<int> sorted_order(const Key* keys, int size, int begin_bit, int end_bit) {
    using Word = std::make_unsigned_t<Key>;
    constexpr int kBits = 8 * sizeof(Key);
    const Word sign = std::is_signed_v<Key> ? Word{1} << (kBits - 1) : 0;
    const Word mask = end_bit == kBits ? ~Word{0} : (Word{1} << end_bit) - 1;
    const auto digits = [&](int i) {
      return static_cast<Word>(((static_cast<Word>(keys[i]) ^ sign) & mask) >> begin_bit);
    };
    std::vector<int> order(static_cast<size_t>(size));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return digits(a) < digits(b); });
    return order;
  }
};

}  // namespace cub
