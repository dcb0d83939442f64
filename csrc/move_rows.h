// Rows that change hands after `rebalance`. Torch-free.
#pragma once

#include <cstdint>

#include "hot_sketch.h"
#include "row_map.h"

namespace torchrec_cafe {

// What happens to one hot row.
struct RowMove {
  int8_t action = kKeepRow;
  int64_t to = 0;
  int64_t from = 0;    // the new owner's shared row
  int64_t second = 0;  // and, for kAddRow, its second row
};

// Everything that says which rows move.
struct RowMoves {
  const int8_t* actions;    // [num_selected, hot_rows_per_shard]
  const int64_t* new_keys;  // [num_selected, hot_rows_per_shard]
  const int64_t* selected;  // [num_selected]
  const int64_t* tables;    // [num_tables, kTableColumns]
  int64_t num_selected;
  int64_t num_tables;
  PoolRows pool;

  CAFE_HOST_DEVICE RowMove operator[](int64_t i) const {
    RowMove move;
    move.action = actions[i];
    if (move.action == kKeepRow) return move;
    const int64_t shard = selected[i / pool.hot_rows_per_shard];
    move.to = pool.hot(shard, i % pool.hot_rows_per_shard);
    if (move.action == kClearRow) return move;
    const int64_t key = new_keys[i];
    if (table_of_key(key) < 0 || table_of_key(key) >= num_tables) {
      move.from = -1;
      return move;
    }
    const Table table = Table::load(tables, table_of_key(key));
    move.from = table.row_offset + table.shared_row(id_of_key(key));
    if (move.action == kAddRow) move.second = pool.offset + pool.second(shard, key);
    return move;
  }

  CAFE_HOST_DEVICE int64_t size() const { return num_selected * pool.hot_rows_per_shard; }
};

CAFE_HOST_DEVICE inline bool fits(const RowMove& move, int64_t num_rows) {
  return move.to >= 0 && move.to < num_rows && move.from >= 0 && move.from < num_rows &&
         move.second >= 0 && move.second < num_rows;
}

// Element d of the row that changes hands. The second row counts as much as the shared one.
template <typename T>
CAFE_HOST_DEVICE inline void move_element(T* rows, int64_t columns, const RowMove& move, int64_t d,
                                          float second_factor) {
  T& to = rows[move.to * columns + d];
  if (move.action == kClearRow) {
    to = static_cast<T>(0.0f);
  } else if (move.action == kCopyRow) {
    to = rows[move.from * columns + d];
  } else {
    const auto first = static_cast<float>(rows[move.from * columns + d]);
    const auto second = static_cast<float>(rows[move.second * columns + d]);
    to = static_cast<T>(second_factor * (first + second));
  }
}

}  // namespace torchrec_cafe
