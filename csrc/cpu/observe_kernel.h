// Learning: what every instruction set compiles of `observe`.
// Part of kernels.cpp.
#pragma once

#include "cpu/kernels.h"
#include "cpu/select.h"

namespace torchrec_cafe {
namespace {

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
    const Occurrences from = seen;  // in registers
    for (int i = 0; i < size; ++i) {
      const int32_t at = positions[i];
      keys[i] = from.keys[at];
      shards[i] = from.shards[at];
      importance[i] = from.importance[at];
    }
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

bool shards_fit(const int32_t* shards, int64_t size, int64_t num_shards) {
  int32_t wrong = 0;
  const auto most = static_cast<int32_t>(num_shards);
  for (int64_t i = 0; i < size; ++i) wrong |= (shards[i] < -1) | (shards[i] >= most);
  return wrong == 0;
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

// The processor's own prefetching loses track of streams that are read in part, between random
// accesses.
__attribute__((always_inline)) inline void ask_for_input(const Occurrences& seen, int64_t from) {
  if (from + kBlock > seen.size) return;
  for (int i = 0; i < kBlock; i += 8) __builtin_prefetch(seen.keys + from + i);
  for (int i = 0; i < kBlock; i += 16) __builtin_prefetch(seen.shards + from + i);
  for (int i = 0; i < kBlock; i += 16) __builtin_prefetch(seen.importance + from + i);
}

void observe_owned(const HotSketch& sketch, const Occurrences& seen, uint64_t groups,
                   Events* events) {
  Gathered gathered[2];
  int32_t positions[2 * kBlock + 4];
  int current = 0;
  int64_t from = 0;
  apply_all(sketch, events, [&](Block& block) {
    if (from >= seen.size) return false;
    int found = 0;
    while (from < seen.size && found < kBlock) {
      const int64_t to = from + kBlock < seen.size ? from + kBlock : seen.size;
      ask_for_input(seen, from + 8 * kBlock);
      found += select(seen.shards, from, to, groups, positions + found);
      from = to;
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

}  // namespace
}  // namespace torchrec_cafe
