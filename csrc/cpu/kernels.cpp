// Compiled once for each instruction set, with CAFE_KERNELS the name of the table it defines. Uses
// no template or inline function of the standard library: the linker could take this file's copy of
// it, made for a newer machine, for the whole program.
#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

// --- learning ------------------------------------------------------------------------------------

// Occurrences are worked on in blocks: the buckets of the next block are on their way from memory
// while those of this one are changed.
constexpr int kBlock = 64;

struct Entry {
  Bucket* bucket;
  int64_t key;
  float score;
  int32_t shard;
};

inline void apply(const Entry* entries, int size, Events* events) {
  for (int i = 0; i < size; ++i) {
    const Insertion outcome = insert(*entries[i].bucket, entries[i].key, entries[i].score);
    ++events[entries[i].shard].by_insertion[outcome];
  }
}

// Applies all that `fill(entries, begin, end)`, which returns how many entries it has made, finds
// in [begin, end).
template <typename Fill>
void apply_in_blocks(int64_t begin, int64_t end, Events* events, const Fill& fill) {
  Entry entries[2][kBlock];
  int sizes[2] = {0, 0};
  int current = 0;
  for (int64_t block = begin; block < end + kBlock; block += kBlock) {
    sizes[current] = 0;
    if (block < end) {
      const int64_t block_end = block + kBlock < end ? block + kBlock : end;
      sizes[current] = fill(entries[current], block, block_end);
      for (int i = 0; i < sizes[current]; ++i) __builtin_prefetch(entries[current][i].bucket, 1);
    }
    current ^= 1;
    apply(entries[current], sizes[current], events);
  }
}

void observe(const HotSketch& sketch, const Occurrences& seen, int64_t begin, int64_t end,
             Events* events) {
  apply_in_blocks(begin, end, events, [&](Entry* entries, int64_t from, int64_t to) {
    int size = 0;
    for (int64_t i = from; i < to; ++i) {
      const int32_t shard = seen.shards[i] < 0 ? 0 : seen.shards[i];
      const int64_t bucket = sketch.bucket_index(shard, seen.keys[i]);
      const float score = score_of(seen.importance[i], seen.inflation[shard]);
      entries[size] = Entry{sketch.buckets + bucket, seen.keys[i], score, shard};
      const bool tracked = seen.shards[i] >= 0;
      const bool valid = is_importance(seen.importance[i]);
      if (__builtin_expect(tracked && !valid, 0)) ++events[shard].non_finite;
      size += tracked & valid;
    }
    return size;
  });
}

void route(const HotSketch& sketch, const Occurrences& seen, const Routing& routing, int64_t begin,
           int64_t end, int64_t num_threads, Events* events) {
  const uint64_t threads_per_bucket =
      (static_cast<uint64_t>(num_threads) << 32) / static_cast<uint64_t>(sketch.num_buckets);
  const auto owner = [&](int64_t i, int64_t first) {
    const uint64_t bucket = static_cast<uint64_t>(routing.buckets[i] - first);
    return static_cast<int64_t>(bucket * threads_per_bucket >> 32);
  };
  for (int64_t t = 0; t < num_threads; ++t) routing.ends[t] = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t shard = seen.shards[i] < 0 ? 0 : seen.shards[i];
    routing.buckets[i] = sketch.bucket_index(shard, seen.keys[i]);
    routing.scores[i] = score_of(seen.importance[i], seen.inflation[shard]);
    const bool tracked = seen.shards[i] >= 0;
    const bool valid = is_importance(seen.importance[i]);
    if (__builtin_expect(tracked && !valid, 0)) ++events[shard].non_finite;
    routing.ends[owner(i, shard * sketch.num_buckets)] += tracked & valid;
  }
  int32_t next = 0;  // ends[t] is where the group begins until all of it is written
  for (int64_t t = 0; t < num_threads; ++t) {
    const int32_t size = routing.ends[t];
    routing.ends[t] = next;
    next += size;
  }
  for (int64_t i = begin; i < end; ++i) {
    if (seen.shards[i] < 0 || !is_importance(seen.importance[i])) continue;
    int32_t& place = routing.ends[owner(i, seen.shards[i] * sketch.num_buckets)];
    routing.positions[place++] = static_cast<int32_t>(i);
  }
}

void observe_routed(const HotSketch& sketch, const Occurrences& seen, const Routing& routing,
                    const int32_t* positions, int64_t size, Events* events) {
  apply_in_blocks(0, size, events, [&](Entry* entries, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int32_t at = positions[i];
      entries[i - from] = Entry{sketch.buckets + routing.buckets[at], seen.keys[at],
                                routing.scores[at], seen.shards[at]};
    }
    return static_cast<int>(to - from);
  });
}

void renormalise(Bucket* buckets, int64_t num_buckets) {
  for (int64_t b = 0; b < num_buckets; ++b) {
    for (float& score : buckets[b].scores) score *= kRenormalise;
  }
}

// --- lookup --------------------------------------------------------------------------------------

// Ids of a group of samples small enough for the first-level cache.
constexpr int64_t kTileIds = 256;

// Writes the bags' offsets and, feature by feature so that a table's numbers stay in registers,
// everything about the ids but whether they are hot.
int64_t map_tile(const RowMap& map, const RemapInput& in, const RemapOutput& out, int64_t begin,
                 int64_t end, int64_t first_out) {
  int64_t next = first_out;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t f = 0; f < map.num_features; ++f) {
      const int64_t* offset = in.offsets + f * map.batch_size + b;
      out.offsets[b * map.num_features + f] = next;
      next += offset[1] - offset[0];
    }
  }
  for (int64_t f = 0; f < map.num_features; ++f) {
    const Table table = Table::load(map.tables, f);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t bag = b * map.num_features + f;
      const int64_t* offset = in.offsets + f * map.batch_size + b;
      int64_t to = out.offsets[bag];
      for (int64_t from = offset[0]; from < offset[1]; ++from, ++to) {
        const int64_t mixed_id = table.first_id + in.ids[from];
        const int64_t shared_row = table.shared_row(mixed_id);
        out.rows[to] = table.row_offset + shared_row;
        out.source[to] = static_cast<int32_t>(from);
        out.bags[to] = static_cast<int32_t>(bag);
        out.keys[to] = table.index < 0 ? 0 : table.key(mixed_id);
        out.shards[to] = map.held_shard(table, shared_row);
      }
    }
  }
  return next;
}

void find_hot_rows(const RowMap& map, const HotSketch& sketch, const RemapOutput& out,
                   int64_t begin, int64_t end) {
  const Bucket* buckets[2][kBlock];
  int current = 0;
  for (int64_t block = begin; block < end + kBlock; block += kBlock) {
    for (int64_t i = block; i < block + kBlock && i < end; ++i) {
      const int32_t shard = out.shards[i] < 0 ? 0 : out.shards[i];
      buckets[current][i - block] = sketch.buckets + sketch.bucket_index(shard, out.keys[i]);
      __builtin_prefetch(buckets[current][i - block]);
    }
    current ^= 1;
    const int64_t last = block - kBlock;
    for (int64_t i = last < begin ? end : last; i < block && i < end; ++i) {
      const int32_t row = hot_row(*buckets[current][i - last], out.keys[i]);
      const bool hot = row >= 0 && out.shards[i] >= 0;
      out.rows[i] = hot ? map.physical_row(out.shards[i], row) : out.rows[i];
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
  const int64_t samples = map.num_features < kTileIds ? kTileIds / map.num_features : 1;
  for (int64_t tile = begin; tile < end; tile += samples) {
    const int64_t tile_end = tile + samples < end ? tile + samples : end;
    const int64_t first_out = next;
    next = map_tile(map, in, out, tile, tile_end, first_out);
    if (has_hot_rows) find_hot_rows(map, sketch, out, first_out, next);
  }
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
const Kernels CAFE_KERNELS{CAFE_CAPABILITY, observe, route,    observe_routed,
                           renormalise,     remap,   rebalance};

}  // namespace torchrec_cafe
