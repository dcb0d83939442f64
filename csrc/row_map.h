// Where an id of a compressed table lives: its shared row, its virtual shard, its key. Torch-free.
#pragma once

#include <cstdint>

#include "hash.h"

namespace torchrec_cafe {

// Columns of the `tables` tensor, int64 [features, kTableColumns]; one row per feature.
inline constexpr int kTableColumns = 5;

struct Table {
  int64_t num_ids;      // rows of the uncompressed table
  int64_t shared_rows;  // rows that the ids share, over all ranks
  int64_t first_id;     // mixed id of the rank's local id 0
  int64_t row_offset;   // physical row of shared row 0 on this rank (may be negative)
  int64_t index;        // number of the table in its pool, or -1: its ids never own a hot row

  CAFE_HOST_DEVICE static Table load(const int64_t* tables, int64_t feature) {
    const int64_t* row = tables + feature * kTableColumns;
    return Table{row[0], row[1], row[2], row[3], row[4]};
  }

  // Monotone in the mixed id, so that a range of ids is a range of rows is a range of shards.
  CAFE_HOST_DEVICE int64_t shared_row(int64_t mixed_id) const {
    return mixed_id * shared_rows / num_ids;
  }

  CAFE_HOST_DEVICE int64_t shard(int64_t shared_row, int64_t num_shards) const {
    return shared_row * num_shards / shared_rows;
  }

  // Distinct for every (table, id) of a pool: tables have fewer than 2^48 rows.
  CAFE_HOST_DEVICE int64_t key(int64_t mixed_id) const { return (index << 48) | mixed_id; }
};

}  // namespace torchrec_cafe
