// Rows that are hit, numbered in the order in which they are first hit: a hash table. Torch-free.
#pragma once

#include <cstdint>

namespace torchrec_cafe {

struct RowPlaces {
  struct Slot {
    int32_t row;
    int32_t place;
  };
  static constexpr Slot kFree{-1, -1};

  Slot* slots;    // a power of two of them, more than rows will be hit
  uint64_t mask;  // how many, less one
  int64_t* rows;  // by place
  int64_t size;

  // Where a row's slot is looked for first.
  __attribute__((always_inline)) uint64_t first_slot(int32_t row) const {
    // Fibonacci hashing: neighbours are spread.
    return (static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15ULL >> 32) & mask;
  }

  // The place of a row, the next if it has none yet; inlined for sure, as in hash.h.
  __attribute__((always_inline)) int64_t find(int32_t row, bool& is_new) {
    uint64_t at = first_slot(row);
    while (slots[at].row != row && slots[at].row >= 0) at = (at + 1) & mask;
    // No condition: whether a row was hit before is a coin toss for the branch predictor.
    is_new = slots[at].row < 0;
    const int64_t place = is_new ? size : slots[at].place;
    slots[at] = {row, static_cast<int32_t>(place)};
    rows[place] = row;
    size += is_new;
    return place;
  }
};

}  // namespace torchrec_cafe
