// Lookup: what every instruction set compiles of `remap`.
// Part of kernels.cpp.
#pragma once

#include <cstdlib>

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

// How many buckets are on their way from memory: looking one up takes a hundredth of fetching it.
constexpr int kLookupBlock = 192;

// Few enough bags at a time for all that is known of their ids to be in the first caches.
constexpr int64_t kTileBags = 2048;

// The ids of some samples, feature after feature as they come.
struct Tile {
  int64_t* rows = nullptr;  // cold
  int64_t* keys = nullptr;
  int32_t* shards = nullptr;
  int64_t capacity = 0;

  Tile() = default;
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;
  ~Tile() { std::free(rows); }

  void reserve(int64_t size) {
    if (size <= capacity) return;
    std::free(rows);
    capacity = 2 * size;
    rows = static_cast<int64_t*>(std::malloc(capacity * 20));
    keys = rows + capacity;
    shards = reinterpret_cast<int32_t*>(keys + capacity);
  }
};

// Plain loops without a condition, which become vector instructions.
inline void map_ids(const RowMap& map, const Table& table, const int64_t* __restrict__ ids,
                    int64_t size, int64_t* __restrict__ rows, int64_t* __restrict__ keys,
                    int32_t* __restrict__ shards) {
  const Table here = table;  // in registers
  for (int64_t i = 0; i < size; ++i) rows[i] = here.shared_row(here.first_id + ids[i]);
  if (here.index < 0) {
    for (int64_t i = 0; i < size; ++i) keys[i] = 0;
    for (int64_t i = 0; i < size; ++i) shards[i] = -1;
  } else {
    const RowMap where = map;
    const double ratio = here.shards_per_row(where.num_shards);
    for (int64_t i = 0; i < size; ++i) keys[i] = here.key(here.first_id + ids[i]);
    for (int64_t i = 0; i < size; ++i) shards[i] = where.held_shard(here, rows[i], ratio);
  }
  for (int64_t i = 0; i < size; ++i) rows[i] += here.row_offset;
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
      out.offsets[bag] = next;
      for (int64_t from = offset[0]; from < offset[1]; ++from, ++next) {
        const int64_t place = from + places[f];
        out.rows[next] = tile.rows[place];
        out.keys[next] = tile.keys[place];
        out.shards[next] = tile.shards[place];
        out.source[next] = static_cast<int32_t>(from);
        out.bags[next] = static_cast<int32_t>(bag);
      }
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

// Copies one feature's values to every `stride`-th element.
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
  const int64_t first_bag = begin * num_features;
  const int64_t samples = end - begin;
  int64_t* __restrict__ starts = out.offsets + first_bag;
  int32_t* __restrict__ bags = out.bags + first_out;
  for (int64_t i = 0; i < samples * num_features; ++i) starts[i] = first_out + i;
  for (int64_t i = 0; i < samples * num_features; ++i)
    bags[i] = static_cast<int32_t>(first_bag + i);
  for (int64_t f = 0; f < num_features; ++f) {
    const int64_t first = in.offsets[f * map.batch_size + begin];
    const int64_t place = first + places[f];
    spread(tile.rows + place, samples, out.rows + first_out + f, num_features);
    spread(tile.keys + place, samples, out.keys + first_out + f, num_features);
    spread(tile.shards + place, samples, out.shards + first_out + f, num_features);
    int32_t* __restrict__ source = out.source + first_out + f;
    for (int64_t b = 0; b < samples; ++b)
      source[b * num_features] = static_cast<int32_t>(first + b);
  }
}

// Writes everything about the ids of samples [begin, end) but whether they are hot. Returns where
// the next sample begins.
int64_t map_samples(const RowMap& map, const RemapInput& in, const RemapOutput& out, int64_t begin,
                    int64_t end, int64_t first_out, Tile& tile, int64_t* places) {
  int64_t size = 0;
  for (int64_t f = 0; f < map.num_features; ++f) {
    const int64_t* offsets = in.offsets + f * map.batch_size;
    places[f] = size - offsets[begin];
    size += offsets[end] - offsets[begin];
  }
  tile.reserve(size);
  for (int64_t f = 0; f < map.num_features; ++f) {
    const int64_t* offsets = in.offsets + f * map.batch_size;
    const int64_t place = places[f] + offsets[begin];
    map_ids(map, Table::load(map.tables, f), in.ids + offsets[begin], offsets[end] - offsets[begin],
            tile.rows + place, tile.keys + place, tile.shards + place);
  }
  const auto write = all_one_hot(map, in, begin, end) ? write_one_hot_bags : write_bags;
  write(map, in, out, begin, end, first_out, places, tile);
  return first_out + size;
}

// Gives those of the ids at [begin, end) that are hot their own rows.
void find_hot_rows(const RowMap& map_in, const HotSketch& sketch_in, const RemapOutput& out,
                   int64_t begin, int64_t end) {
  const RowMap map = map_in;
  const HotSketch sketch = sketch_in;
  int64_t buckets[2][kLookupBlock];
  int sizes[2] = {0, 0};
  for (int64_t first = begin - kLookupBlock, current = 1; first < end;
       first += kLookupBlock, current ^= 1) {
    // The buckets of the next block, which are asked for while this one is looked up.
    const int64_t ahead = first + kLookupBlock;
    const int64_t* __restrict__ keys = out.keys + ahead;
    const int32_t* __restrict__ shards = out.shards + ahead;
    int64_t* __restrict__ next = buckets[current ^ 1];
    const int next_size = static_cast<int>(end - ahead < kLookupBlock ? end - ahead : kLookupBlock);
    for (int i = 0; i < next_size; ++i) {
      next[i] = sketch.bucket_index(shards[i] < 0 ? 0 : shards[i], keys[i]);
    }
    sizes[current ^ 1] = next_size;
    for (int i = sizes[current]; i < next_size; ++i) __builtin_prefetch(sketch.buckets + next[i]);
    for (int i = 0; i < sizes[current]; ++i) {
      if (i < next_size) __builtin_prefetch(sketch.buckets + next[i]);
      // A mask, not a condition: hot or not is a coin toss for the branch predictor.
      const int32_t shard = out.shards[first + i];
      const int32_t row = hot_row(sketch.buckets[buckets[current][i]], out.keys[first + i]);
      const int64_t cold = (row | shard) >> 31;
      const int64_t own = map.physical_row(shard, row);
      out.rows[first + i] = (out.rows[first + i] & cold) | (own & ~cold);
    }
  }
}

bool offsets_ascend(const int64_t* offsets, int64_t size) {
  int64_t wrong = 0;
  for (int64_t i = 1; i < size; ++i) wrong |= offsets[i] < offsets[i - 1];
  return wrong == 0;
}

void remap(const RowMap& map, const HotSketch& sketch, const RemapInput& in, const RemapOutput& out,
           int64_t begin, int64_t end) {
  int64_t next = 0;
  for (int64_t f = 0; f < map.num_features; ++f) {
    const int64_t* offsets = in.offsets + f * map.batch_size;
    next += offsets[begin] - offsets[0];
  }
  const bool has_hot_rows = sketch.num_shards > 0 && sketch.num_buckets > 0;
  const int64_t samples = map.num_features < kTileBags ? kTileBags / map.num_features : 1;
  Tile tile;
  auto* places = static_cast<int64_t*>(std::malloc(map.num_features * sizeof(int64_t)));
  for (int64_t first = begin; first < end; first += samples) {
    const int64_t first_out = next;
    const int64_t last = first + samples < end ? first + samples : end;
    next = map_samples(map, in, out, first, last, first_out, tile, places);
    if (has_hot_rows) find_hot_rows(map, sketch, out, first_out, next);
  }
  std::free(places);
}

}  // namespace
}  // namespace torchrec_cafe
