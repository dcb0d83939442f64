// Rows of several tables as rows of one. Torch-free.
#pragma once

#include <cstdint>

#include "hash.h"

namespace torchrec_cafe {

// Words of a feature's table: its first row, and how many it has.
constexpr int64_t kRowRangeWords = 2;

constexpr int64_t kNoRow = -1;

// The row of an id, and whether the id is in its table. One that is not is taken as id 0, as FBGEMM
// does; in a table without rows there is none to take.
struct PooledRow {
  int64_t key;
  bool in_range;
};

CAFE_HOST_DEVICE inline PooledRow pooled_row(const int64_t* range, int64_t id) {
  const bool in_range = id >= 0 && id < range[1];
  if (range[1] == 0) return {kNoRow, false};
  return {range[0] + (in_range ? id : 0), in_range};
}

}  // namespace torchrec_cafe
