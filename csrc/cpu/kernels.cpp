// Compiled once for each instruction set, with CAFE_KERNELS the name of the table it defines. Uses
// no template or inline function of the standard library: the linker could take this file's copy of
// it, made for a newer machine, for the whole program.
#include "cpu/kernels.h"

#include <cstdlib>

namespace torchrec_cafe {
namespace {

// --- learning ------------------------------------------------------------------------------------

// Occurrences are worked on in blocks: the buckets of the next block are on their way from memory
// while those of this one are changed.
constexpr int kBlock = 64;

struct Block {
  const int64_t* keys;
  const int32_t* shards;
  int64_t buckets[2 * kBlock];
  float scores[2 * kBlock];
  int size;
};

// Asks for the buckets of the next block one by one: all at once would have to wait for memory.
inline void apply(const HotSketch& sketch, const Block& block, const Block& next, Events* events) {
  for (int i = block.size; i < next.size; ++i) {
    __builtin_prefetch(sketch.buckets + next.buckets[i], 1);
  }
  for (int i = 0; i < block.size; ++i) {
    if (i < next.size) __builtin_prefetch(sketch.buckets + next.buckets[i], 1);
    // Added always, at an address that does not depend on the outcome: nothing waits for it.
    events[block.shards[i]].insertions +=
        insert(sketch.buckets[block.buckets[i]], block.keys[i], block.scores[i]);
  }
}

// Applies every block that `fill` makes; it returns false when there is nothing left.
template <typename Fill>
void apply_all(const HotSketch& sketch, Events* events, const Fill& fill) {
  Block blocks[2];
  blocks[1].size = 0;
  bool more = fill(blocks[0]);
  if (more) apply(sketch, blocks[1], blocks[0], events);  // asks for the first block's buckets
  for (int current = 0; more; current ^= 1) {
    blocks[current ^ 1].size = 0;
    more = fill(blocks[current ^ 1]);
    apply(sketch, blocks[current], blocks[current ^ 1], events);
  }
}

// Copies of occurrences that do not lie side by side.
struct Gathered {
  int64_t keys[2 * kBlock];
  int32_t shards[2 * kBlock];
  float importance[2 * kBlock];

  void gather(const Occurrences& seen, const int32_t* positions, int size) {
    for (int i = 0; i < size; ++i) keys[i] = seen.keys[positions[i]];
    for (int i = 0; i < size; ++i) shards[i] = seen.shards[positions[i]];
    for (int i = 0; i < size; ++i) importance[i] = seen.importance[positions[i]];
  }
};

// Makes a block of `size` occurrences that are all learned from. Plain loops without a condition,
// which become vector instructions.
inline void make_block(const HotSketch& sketch, const Occurrences& seen,
                       const int64_t* __restrict__ keys, const int32_t* __restrict__ shards,
                       const float* __restrict__ importance, int size, Block& block) {
  block.keys = keys;
  block.shards = shards;
  block.size = size;
  const HotSketch here = sketch;  // in registers
  int64_t* __restrict__ buckets = block.buckets;
  for (int i = 0; i < size; ++i) buckets[i] = here.bucket_index(shards[i], keys[i]);
  const double inflation = seen.inflation[0];
  float* __restrict__ scores = block.scores;
  for (int i = 0; i < size; ++i) scores[i] = score_of(importance[i], inflation);
  if (seen.same_inflation) return;
  for (int i = 0; i < size; ++i) scores[i] = score_of(importance[i], seen.inflation[shards[i]]);
}

inline bool all_tracked(const int32_t* shards, int size) {
  int32_t least = 0;
  for (int i = 0; i < size; ++i) least |= shards[i];
  return least >= 0;
}

inline bool all_importance(const float* importance, int size) {
  int32_t wrong = 0;
  for (int i = 0; i < size; ++i) wrong |= !is_importance(importance[i]);
  return wrong == 0;
}

// Makes a block of the occurrences at `positions` that have an importance, and counts the others.
inline void make_block_at(const HotSketch& sketch, const Occurrences& seen, int32_t* positions,
                          int size, Gathered& gathered, Events* events, Block& block) {
  gathered.gather(seen, positions, size);
  if (!all_importance(gathered.importance, size)) {
    int kept = 0;
    for (int i = 0; i < size; ++i) {
      const bool valid = is_importance(gathered.importance[i]);
      events[gathered.shards[i]].non_finite += !valid;
      positions[kept] = positions[i];
      kept += valid;
    }
    size = kept;
    gathered.gather(seen, positions, size);
  }
  make_block(sketch, seen, gathered.keys, gathered.shards, gathered.importance, size, block);
}

void observe(const HotSketch& sketch, const Occurrences& seen, Events* events) {
  Gathered gathered[2];  // as many as there are blocks
  int32_t positions[kBlock];
  int current = 0;
  int64_t from = 0;
  apply_all(sketch, events, [&](Block& block) {
    if (from >= seen.size) return false;
    const int size = seen.size - from < kBlock ? static_cast<int>(seen.size - from) : kBlock;
    const int32_t* shards = seen.shards + from;
    const float* importance = seen.importance + from;
    if (all_tracked(shards, size) && all_importance(importance, size)) {
      make_block(sketch, seen, seen.keys + from, shards, importance, size, block);
    } else {
      int found = 0;
      for (int i = 0; i < size; ++i) {
        positions[found] = static_cast<int32_t>(from) + i;
        found += shards[i] >= 0;
      }
      make_block_at(sketch, seen, positions, found, gathered[current ^= 1], events, block);
    }
    from += size;
    return true;
  });
}

void observe_owned(const HotSketch& sketch, const Occurrences& seen, const int32_t* owned,
                   Events* events) {
  Gathered gathered[2];
  int32_t positions[2 * kBlock];
  int current = 0;
  int64_t from = 0;
  apply_all(sketch, events, [&](Block& block) {
    if (from >= seen.size) return false;
    int found = 0;
    while (from < seen.size && found < kBlock) {
      const int64_t to = from + kBlock < seen.size ? from + kBlock : seen.size;
      for (; from < to; ++from) {
        positions[found] = static_cast<int32_t>(from);
        found -= owned[seen.shards[from] + 1];
      }
    }
    make_block_at(sketch, seen, positions, found, gathered[current ^= 1], events, block);
    return true;
  });
}

void renormalise(Bucket* buckets, int64_t num_buckets) {
  for (int64_t b = 0; b < num_buckets; ++b) {
    for (float& score : buckets[b].scores) score *= kRenormalise;
  }
}

// --- lookup --------------------------------------------------------------------------------------

// Few enough bags at a time for all that is known of their ids to be in the first caches.
constexpr int64_t kTileBags = 1024;

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
  int64_t buckets[2][kBlock];
  int sizes[2] = {0, 0};
  for (int64_t first = begin - kBlock, current = 1; first < end; first += kBlock, current ^= 1) {
    // The buckets of the next block, which are asked for while this one is looked up.
    const int64_t ahead = first + kBlock;
    const int64_t* __restrict__ keys = out.keys + ahead;
    const int32_t* __restrict__ shards = out.shards + ahead;
    int64_t* __restrict__ next = buckets[current ^ 1];
    const int next_size = static_cast<int>(end - ahead < kBlock ? end - ahead : kBlock);
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

// --- which keys own a row ------------------------------------------------------------------------

int64_t count(const Shard& shard, const Candidates& which) {
  int64_t size = 0;
  for (int64_t b = 0; b < shard.num_buckets; ++b) {
    const Bucket& bucket = shard.buckets[b];
    for (int j = 0; j < kSlots; ++j) size += which.contain(bucket.hot_rows[j], bucket.scores[j]);
  }
  return size;
}

// The n-th largest score of the candidates, 1 <= n <= their number.
float nth_largest(const Shard& shard, int64_t n, const Candidates& which) {
  RadixSelect select(n);
  for (int round = 0; round < RadixSelect::kRounds; ++round) {
    // One histogram a slot: neighbouring scores often have the same digit, and would wait for each
    // other's count.
    int32_t counts[kSlots][RadixSelect::kDigits] = {};
    for (int64_t b = 0; b < shard.num_buckets; ++b) {
      const Bucket& bucket = shard.buckets[b];
      for (int j = 0; j < kSlots; ++j) {
        const float score = bucket.scores[j];
        if (which.contain(bucket.hot_rows[j], score) && select.matches(score)) {
          ++counts[j][RadixSelect::digit(score, round)];
        }
      }
    }
    for (int digit = 0; digit < RadixSelect::kDigits; ++digit) {
      for (int j = 1; j < kSlots; ++j) counts[0][digit] += counts[j][digit];
    }
    select.settle(counts[0], round);
  }
  return select.score();
}

void rebalance(const Shard& shard, float min_score, float hysteresis, int8_t* actions,
               int64_t* new_keys, int64_t* promoted, int64_t* demoted) {
  const Candidates all{Candidates::kMaxRow, 0.0f};
  const bool scarce = count(shard, all) > shard.num_hot_rows;
  const float nth = scarce ? nth_largest(shard, shard.num_hot_rows, all) : 0.0f;
  const Threshold threshold(nth, min_score, hysteresis);
  int64_t num_free = 0;
  for (int64_t row = 0; row < shard.num_hot_rows; ++row) {
    actions[row] = shard.demote(row, threshold.keep);
    new_keys[row] = 0;
    *demoted += actions[row] == kClearRow;
    num_free += shard.owners[row] == kNoOwner;
  }
  const Candidates eligible{kCold, threshold.promote};
  const int64_t num_eligible = num_free == 0 ? 0 : count(shard, eligible);
  if (num_eligible == 0) return;
  float cut = threshold.promote;  // promote above the cut, and `at_cut` keys exactly at it
  int64_t at_cut = num_eligible;
  if (num_eligible > num_free) {
    cut = nth_largest(shard, num_free, eligible);
    at_cut = num_free - count(shard, Candidates{kCold, float_from_bits(float_bits(cut) + 1)});
  }
  int64_t row = 0;
  for (int64_t slot = 0; slot < shard.num_buckets * kSlots; ++slot) {
    if (shard.hot_row(slot) != kCold || shard.score(slot) < cut) continue;
    if (shard.score(slot) == cut && at_cut-- <= 0) continue;
    while (row < shard.num_hot_rows && shard.owners[row] != kNoOwner) ++row;
    if (row == shard.num_hot_rows) return;
    shard.promote(slot, row);
    actions[row] = kCopyRow;
    new_keys[row] = shard.key(slot);
    ++*promoted;
  }
}

}  // namespace

extern const Kernels CAFE_KERNELS;
const Kernels CAFE_KERNELS{CAFE_CAPABILITY, observe, observe_owned, renormalise, remap, rebalance};

}  // namespace torchrec_cafe
