// Where an id of a compressed table lives: its shared row, its virtual shard, its key. Torch-free.
#pragma once

#include <cstdint>

#include "hash.h"

namespace torchrec_cafe {

// floor(x / divisor) from scale = floor(numerator * 2^64 / divisor), or 2^64 - 1 where they are
// equal, and x = factor * numerator < 2^110: the estimate is right or one too small.
CAFE_HOST_DEVICE inline int64_t scaled_quotient(uint64_t factor, uint64_t scale, uint64_t numerator,
                                                uint64_t divisor) {
  const uint64_t estimate = multiply_high(factor, scale);
  const uint64_t rest = factor * numerator - estimate * divisor;
  return static_cast<int64_t>(estimate + (rest >= divisor ? 1 : 0));
}

// Columns of the `tables` tensor, int64 [features, kTableColumns]; one row per feature.
inline constexpr int kTableColumns = 7;

struct Table {
  int64_t num_ids;       // rows of the uncompressed table, < 2^47
  int64_t shared_rows;   // rows that the ids share, over all ranks
  int64_t first_id;      // mixed id of the rank's local id 0
  int64_t row_offset;    // physical row of shared row 0 on this rank (may be negative)
  int64_t index;         // number of the table in its pool, or -1: its ids never own a hot row
  uint64_t row_scale;    // min(floor(shared_rows * 2^64 / num_ids), 2^64 - 1)
  uint64_t shard_scale;  // floor((2^64 - 1) / shared_rows)

  CAFE_HOST_DEVICE static Table load(const int64_t* tables, int64_t feature) {
    const int64_t* row = tables + feature * kTableColumns;
    return Table{row[0],
                 row[1],
                 row[2],
                 row[3],
                 row[4],
                 static_cast<uint64_t>(row[5]),
                 static_cast<uint64_t>(row[6])};
  }

  // floor(mixed_id * shared_rows / num_ids): monotone in the mixed id, so that a range of ids is a
  // range of rows is a range of shards.
  CAFE_HOST_DEVICE int64_t shared_row(int64_t mixed_id) const {
    return scaled_quotient(mixed_id, row_scale, shared_rows, num_ids);
  }

  // floor(shared_row * num_shards / shared_rows); the product must be below 2^63.
  CAFE_HOST_DEVICE int64_t shard(int64_t shared_row, int64_t num_shards) const {
    return scaled_quotient(static_cast<uint64_t>(shared_row * num_shards), shard_scale, 1,
                           shared_rows);
  }

  // Distinct for every (table, id) of a pool: tables have fewer than 2^48 rows.
  CAFE_HOST_DEVICE int64_t key(int64_t mixed_id) const { return (index << 48) | mixed_id; }
};

// What `remap` reads besides the ids.
struct RowMap {
  const int64_t* tables;
  int64_t num_features;
  int64_t batch_size;
  int64_t first_shard;  // global number of this rank's first shard
  int64_t num_shards;   // over all ranks
  int64_t shards_held;  // on this rank
  int64_t rows_per_shard;
  int64_t hot_offset;  // physical row of the first hot row

  // The shard of a tracked id on this rank, or -1: not tracked.
  CAFE_HOST_DEVICE int32_t held_shard(const Table& table, int64_t shared_row) const {
    if (table.index < 0) return -1;
    const int64_t held = table.shard(shared_row, num_shards) - first_shard;
    return held >= 0 && held < shards_held ? static_cast<int32_t>(held) : -1;
  }

  CAFE_HOST_DEVICE int64_t physical_row(int32_t shard, int32_t hot_row) const {
    return hot_offset + shard * rows_per_shard + hot_row;
  }
};

}  // namespace torchrec_cafe
