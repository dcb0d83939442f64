// Lookup: what every instruction set compiles of `remap`.
// Part of kernels.cpp.
#pragma once

#include <cstdlib>

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

// How many buckets are on their way from memory: looking one up takes a hundredth of fetching it.
constexpr int kLookupBlock = 192;

// Few enough ids at a time for all that is known of them to be in the first caches.
constexpr int64_t kTileIds = 4096;

// The ids of some samples, feature after feature, those that may be hot first.
struct Tile {
  int64_t* rows = nullptr;
  int64_t* keys = nullptr;
  int32_t* shards = nullptr;  // below 0 once an id is found to be hot
  int32_t* second = nullptr;  // from the first row of the pool, or -1
  int64_t capacity = 0;

  Tile() = default;
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;
  ~Tile() { std::free(rows); }

  void reserve(int64_t size) {
    if (size <= capacity) return;
    std::free(rows);
    capacity = 2 * size;
    rows = static_cast<int64_t*>(std::malloc(capacity * 24));
    keys = rows + capacity;
    shards = reinterpret_cast<int32_t*>(keys + capacity);
    second = shards + capacity;
  }
};

// Plain loops without a condition, which become vector instructions.
inline void map_to_shared_rows(const Table& table, const int64_t* __restrict__ ids, int64_t size,
                               int64_t* __restrict__ rows) {
  const Table here = table;  // in registers
  for (int64_t i = 0; i < size; ++i) rows[i] = here.shared_row(here.first_id + ids[i]);
}

inline void find_keys(const RowMap& map, const Table& table, const int64_t* __restrict__ ids,
                      const int64_t* __restrict__ shared_rows, int64_t size,
                      int64_t* __restrict__ keys, int32_t* __restrict__ shards) {
  const Table here = table;
  const RowMap where = map;
  const double ratio = here.shards_per_row(where.num_shards);
  for (int64_t i = 0; i < size; ++i) keys[i] = here.key(here.first_id + ids[i]);
  for (int64_t i = 0; i < size; ++i) shards[i] = where.held_shard(here, shared_rows[i], ratio);
}

inline void add_offset(int64_t row_offset, int64_t size, int64_t* __restrict__ rows) {
  for (int64_t i = 0; i < size; ++i) rows[i] += row_offset;
}

// Writes out a tile sample by sample. `places` are the features' first places in the tile less
// their first ids.
void write_bags(const RowMap& map, const RemapInput& in, const RemapOutput& out, int64_t begin,
                int64_t end, int64_t next, const int64_t* places, const Tile& tile) {
  const int64_t num_features = map.num_features;
  const int64_t batch_size = map.batch_size;
  int64_t bag = begin * num_features;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* offset = in.offsets + b;
    for (int64_t f = 0; f < num_features; ++f, ++bag, offset += batch_size) {
      const int64_t from = offset[0];
      const int64_t size = offset[1] - from;
      const int64_t* __restrict__ rows = tile.rows + from + places[f];
      out.offsets[bag] = next;
      for (int64_t i = 0; i < size; ++i) out.rows[next + i] = rows[i];
      if (out.second != nullptr) {
        const int32_t* __restrict__ second = tile.second + from + places[f];
        for (int64_t i = 0; i < size; ++i) out.second[next + i] = second[i];
      }
      if (out.source != nullptr) {
        for (int64_t i = 0; i < size; ++i) out.source[next + i] = static_cast<int32_t>(from + i);
      }
      next += size;
    }
  }
}

// Whether every bag of samples [begin, end) holds one id, as in most models.
bool all_one_hot(const RowMap& map, const RemapInput& in, int64_t begin, int64_t end) {
  int64_t others = 0;
  for (int64_t f = 0; f < map.num_features; ++f) {
    const int64_t* offset = in.offsets + f * map.batch_size;
    for (int64_t b = begin; b < end; ++b) others |= offset[b + 1] - offset[b] - 1;
  }
  return others == 0;
}

// Copies what is known of one feature's ids to every `stride`-th element.
template <typename T>
inline void spread(const T* __restrict__ from, int64_t size, T* __restrict__ to, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < size; ++i) to[i] = from[i];
  } else {
    for (int64_t i = 0; i < size; ++i) to[i * stride] = from[i];
  }
}

// write_bags where all bags hold one id: a transposition.
void write_one_hot_bags(const RowMap& map, const RemapInput& in, const RemapOutput& out,
                        int64_t begin, int64_t end, int64_t first_out, const int64_t* places,
                        const Tile& tile) {
  const int64_t num_features = map.num_features;
  const int64_t samples = end - begin;
  int64_t* __restrict__ starts = out.offsets + begin * num_features;
  for (int64_t i = 0; i < samples * num_features; ++i) starts[i] = first_out + i;
  for (int64_t f = 0; f < num_features; ++f) {
    const int64_t first = in.offsets[f * map.batch_size + begin];
    const int64_t place = first + places[f];
    spread(tile.rows + place, samples, out.rows + first_out + f, num_features);
    if (out.second != nullptr) {
      spread(tile.second + place, samples, out.second + first_out + f, num_features);
    }
    if (out.source == nullptr) continue;
    int32_t* __restrict__ source = out.source + first_out + f;
    for (int64_t b = 0; b < samples; ++b)
      source[b * num_features] = static_cast<int32_t>(first + b);
  }
}

// Gives those of the first `size` ids of a tile that are hot their own rows, and those that are
// medium a second one.
template <bool kSecondRows>
void find_hot_rows(const RowMap& map_in, const HotSketch& sketch_in, Tile& tile, int64_t size) {
  const RowMap map = map_in;
  const HotSketch sketch = sketch_in;
  int64_t buckets[2][kLookupBlock];
  [[maybe_unused]] int32_t seconds[2][kLookupBlock];
  int sizes[2] = {0, 0};
  for (int64_t first = -kLookupBlock, current = 1; first < size;
       first += kLookupBlock, current ^= 1) {
    // The buckets of the next block, which are asked for while this one is looked up.
    const int64_t ahead = first + kLookupBlock;
    const int64_t* __restrict__ keys = tile.keys + ahead;
    const int32_t* __restrict__ shards = tile.shards + ahead;
    int64_t* __restrict__ next = buckets[current ^ 1];
    const int64_t left = size > ahead ? size - ahead : 0;
    const int next_size = static_cast<int>(left < kLookupBlock ? left : kLookupBlock);
    for (int i = 0; i < next_size; ++i) {
      next[i] = sketch.bucket_index(shards[i] < 0 ? 0 : shards[i], keys[i]);
    }
    if constexpr (kSecondRows) {
      int32_t* __restrict__ second = seconds[current ^ 1];
      for (int i = 0; i < next_size; ++i) {
        second[i] = static_cast<int32_t>(map.pool.second(shards[i], keys[i]));
      }
    }
    sizes[current ^ 1] = next_size;
    for (int i = sizes[current]; i < next_size; ++i) __builtin_prefetch(sketch.buckets + next[i]);
    for (int i = 0; i < sizes[current]; ++i) {
      if (i < next_size) __builtin_prefetch(sketch.buckets + next[i]);
      // A mask, not a condition: hot or not is a coin toss for the branch predictor.
      const int32_t shard = tile.shards[first + i];
      const int32_t row = hot_row(sketch.buckets[buckets[current][i]], tile.keys[first + i]);
      const int64_t cold = (row | shard) >> 31;
      const int64_t own = map.pool.hot(shard, row);
      tile.rows[first + i] = (tile.rows[first + i] & cold) | (own & ~cold);
      tile.shards[first + i] = shard | static_cast<int32_t>(~cold);
      if constexpr (kSecondRows) {
        const Bucket& bucket = sketch.buckets[buckets[current][i]];
        const bool medium = is_medium(bucket, tile.keys[first + i]) & (shard >= 0);
        tile.second[first + i] = medium ? seconds[current][i] : -1;
      }
    }
  }
}

// Copies what is known of one feature's ids to where they came from.
inline void write_keys(const RemapOutput& out, const Tile& tile, int64_t from, int64_t place,
                       int64_t size) {
  const int64_t* __restrict__ keys = tile.keys + place;
  const int32_t* __restrict__ shards = tile.shards + place;
  for (int64_t i = 0; i < size; ++i) out.keys[from + i] = keys[i];
  for (int64_t i = 0; i < size; ++i) out.shards[from + i] = shards[i];
}

// Copies the shards of the tracked ids of samples [begin, end) that are not hot to where the ids
// came from; those of the others are below 0.
void write_cold_shards(const RowMap& map, const RemapInput& in, int64_t begin, int64_t end,
                       const int64_t* places, const Tile& tile, int32_t* cold_shards) {
  for (int64_t f = 0; f < map.num_features; ++f) {
    const int64_t from = in.offsets[f * map.batch_size + begin];
    const int64_t size = in.offsets[f * map.batch_size + end] - from;
    const bool tracked = Table::load(map.tables, f).index >= 0;
    const int32_t* __restrict__ shards = tile.shards + places[f] + from;
    int32_t* __restrict__ out = cold_shards + from;
    if (tracked) {
      for (int64_t i = 0; i < size; ++i) out[i] = shards[i];
    } else {
      for (int64_t i = 0; i < size; ++i) out[i] = -1;
    }
  }
}

// Maps the ids of samples [begin, end) into a tile; the features that may be hot come first.
void map_samples(const RowMap& map, const HotSketch& sketch, const RemapInput& in,
                 const RemapOutput& out, int64_t begin, int64_t end, Tile& tile, int64_t* places) {
  int64_t place = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const bool tracked = pass == 0;
    for (int64_t f = 0; f < map.num_features; ++f) {
      const Table table = Table::load(map.tables, f);
      if ((out.keys != nullptr && table.index >= 0) != tracked) continue;
      const int64_t from = in.offsets[f * map.batch_size + begin];
      const int64_t size = in.offsets[f * map.batch_size + end] - from;
      const int64_t* ids = in.ids + from;
      places[f] = place - from;
      map_to_shared_rows(table, ids, size, tile.rows + place);
      if (tracked) {
        find_keys(map, table, ids, tile.rows + place, size, tile.keys + place, tile.shards + place);
        write_keys(out, tile, from, place, size);
      } else if (out.keys != nullptr) {
        for (int64_t i = 0; i < size; ++i) out.keys[from + i] = 0;
        for (int64_t i = 0; i < size; ++i) out.shards[from + i] = -1;
      }
      if (out.second != nullptr) {
        for (int64_t i = 0; i < size; ++i) tile.second[place + i] = -1;
      }
      add_offset(table.row_offset, size, tile.rows + place);
      place += size;
    }
    if (!tracked || map.shards_held == 0) continue;
    const auto find = out.second == nullptr ? find_hot_rows<false> : find_hot_rows<true>;
    find(map, sketch, tile, place);
  }
  if (out.cold_shards != nullptr) {
    write_cold_shards(map, in, begin, end, places, tile, out.cold_shards);
  }
}

bool offsets_ascend(const int64_t* offsets, int64_t size) {
  int64_t wrong = 0;
  for (int64_t i = 1; i < size; ++i) wrong |= offsets[i] < offsets[i - 1];
  return wrong == 0;
}

void remap(const RowMap& map, const HotSketch& sketch, const RemapInput& in, const RemapOutput& out,
           int64_t begin, int64_t end) {
  if (begin >= end) return;
  const auto ids_of = [&](int64_t first, int64_t last) {
    int64_t size = 0;
    for (int64_t f = 0; f < map.num_features; ++f) {
      const int64_t* offsets = in.offsets + f * map.batch_size;
      size += offsets[last] - offsets[first];
    }
    return size;
  };
  const int64_t per_sample = 1 + in.offsets[map.num_features * map.batch_size] / map.batch_size;
  const int64_t samples = per_sample < kTileIds ? kTileIds / per_sample : 1;
  int64_t next = ids_of(0, begin);
  Tile tile;
  auto* places = static_cast<int64_t*>(std::malloc(map.num_features * sizeof(int64_t)));
  for (int64_t first = begin; first < end; first += samples) {
    const int64_t last = first + samples < end ? first + samples : end;
    const int64_t size = ids_of(first, last);
    tile.reserve(size);
    map_samples(map, sketch, in, out, first, last, tile, places);
    const auto write = all_one_hot(map, in, first, last) ? write_one_hot_bags : write_bags;
    write(map, in, out, first, last, next, places, tile);
    next += size;
  }
  std::free(places);
}

}  // namespace
}  // namespace torchrec_cafe
