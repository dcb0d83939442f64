// Where an id of a compressed table lives: its shared row, its virtual shard, its key. Torch-free.
#pragma once

#include <cstdint>

#include "hash.h"

namespace torchrec_cafe {

// floor(x * numerator / divisor), exactly, for 0 <= x < 2^47 and numerator <= divisor or 2^16,
// without a division: the estimate from ratio = numerator / divisor is at most one off. Nothing but
// what vector units have.
CAFE_HOST_DEVICE inline int64_t scaled(int64_t x, int64_t numerator, int64_t divisor,
                                       double ratio) {
  const auto estimate = static_cast<int64_t>(static_cast<double>(x) * ratio);
  // May wrap around on the way to the remainder, which is small.
  const auto rest =
      static_cast<int64_t>(static_cast<uint64_t>(x) * static_cast<uint64_t>(numerator) -
                           static_cast<uint64_t>(estimate) * static_cast<uint64_t>(divisor));
  return estimate + (rest >= divisor ? 1 : 0) - (rest < 0 ? 1 : 0);
}

// The table and the mixed id of a key; see Table::key.
CAFE_HOST_DEVICE inline int64_t table_of_key(int64_t key) { return key >> 48; }
CAFE_HOST_DEVICE inline int64_t id_of_key(int64_t key) { return key & ((int64_t{1} << 48) - 1); }

// Which of a shard's second rows a medium key adds to its shared row. The sketch's buckets are
// chosen by the other half of the hash.
CAFE_HOST_DEVICE inline int64_t second_row(int64_t key, int64_t num_rows) {
  const uint64_t low = hash64(static_cast<uint64_t>(key)) & 0xffffffffu;
  return static_cast<int64_t>((low * static_cast<uint64_t>(num_rows)) >> 32);
}

// The rows of a pool: those of its shards one after the other, hot rows before second rows.
struct PoolRows {
  int64_t offset;          // physical row of the first
  int64_t rows_per_shard;  // hot and second
  int64_t hot_rows_per_shard;

  CAFE_HOST_DEVICE int64_t hot(int64_t shard, int64_t row) const {
    return offset + shard * rows_per_shard + row;
  }
  // The second row of a key, counted from the first row of the pool.
  CAFE_HOST_DEVICE int64_t second(int64_t shard, int64_t key) const {
    const int64_t row = second_row(key, rows_per_shard - hot_rows_per_shard);
    return shard * rows_per_shard + hot_rows_per_shard + row;
  }
};

// Columns of the `tables` tensor, int64 [features, kTableColumns]; one row per feature.
inline constexpr int kTableColumns = 5;
inline constexpr int64_t kMostIds = int64_t{1} << 47;
inline constexpr int64_t kMostShards = int64_t{1} << 16;
inline constexpr int64_t kMostTables = int64_t{1} << 15;

struct Table {
  int64_t num_ids;      // rows of the uncompressed table, < 2^47
  int64_t shared_rows;  // rows that the ids share, over all ranks
  int64_t first_id;     // mixed id of the rank's local id 0
  int64_t row_offset;   // physical row of shared row 0 on this rank (may be negative)
  int64_t index;        // number of the table in its pool, or -1: its ids never own a hot row
  double rows_per_id;

  CAFE_HOST_DEVICE static Table load(const int64_t* tables, int64_t feature) {
    const int64_t* row = tables + feature * kTableColumns;
    const double ratio = static_cast<double>(row[1]) / static_cast<double>(row[0]);
    return Table{row[0], row[1], row[2], row[3], row[4], ratio};
  }

  // Monotone in the mixed id, so that a range of ids is a range of rows is a range of shards.
  CAFE_HOST_DEVICE int64_t shared_row(int64_t mixed_id) const {
    return scaled(mixed_id, shared_rows, num_ids, rows_per_id);
  }

  CAFE_HOST_DEVICE double shards_per_row(int64_t num_shards) const {
    return static_cast<double>(num_shards) / static_cast<double>(shared_rows);
  }

  CAFE_HOST_DEVICE int64_t shard(int64_t shared_row, int64_t num_shards, double ratio) const {
    return scaled(shared_row, num_shards, shared_rows, ratio);
  }

  // Distinct for every (table, id) of a pool: tables have fewer than 2^48 rows.
  CAFE_HOST_DEVICE int64_t key(int64_t mixed_id) const { return (index << 48) | mixed_id; }
};

// Rows of an id by the quotient-remainder trick (Shi et al., KDD 2020): one for its remainder by
// the number of shared rows and, after those, one for its quotient. No two ids have both in common.
struct QuotientRemainder {
  struct Rows {
    int64_t remainder;
    int64_t quotient;
  };

  int64_t divisor;
  int64_t first_id;
  int64_t row_offset;
  double inverse;

  CAFE_HOST_DEVICE static QuotientRemainder load(const int64_t* tables, int64_t feature) {
    const Table table = Table::load(tables, feature);
    return {table.shared_rows, table.first_id, table.row_offset,
            1.0 / static_cast<double>(table.shared_rows)};
  }

  CAFE_HOST_DEVICE Rows rows(int64_t local_id) const {
    const int64_t mixed_id = first_id + local_id;
    const int64_t quotient = scaled(mixed_id, 1, divisor, inverse);
    return {row_offset + mixed_id - quotient * divisor, row_offset + divisor + quotient};
  }
};

// What `remap` reads besides the ids.
struct RowMap {
  const int64_t* tables;
  int64_t num_features;
  int64_t batch_size;
  int64_t first_shard;  // global number of this rank's first shard
  int64_t num_shards;   // over all ranks
  int64_t shards_held;  // on this rank
  PoolRows pool;

  // The shard of a shared row on this rank, or -1: it is another rank's. `ratio` is the table's
  // shards_per_row(num_shards).
  CAFE_HOST_DEVICE int32_t held_shard(const Table& table, int64_t shared_row, double ratio) const {
    const int64_t held = table.shard(shared_row, num_shards, ratio) - first_shard;
    return static_cast<int32_t>((held >= 0) & (held < shards_held) ? held : -1);
  }

  // Whether medium ids have a second row.
  CAFE_HOST_DEVICE bool has_second_rows() const {
    return pool.rows_per_shard > pool.hot_rows_per_shard;
  }
};

}  // namespace torchrec_cafe
