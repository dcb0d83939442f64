// HotSketch (CAFE, SIGMOD 2024, section 3.2), written once for host and device. Torch-free.
//
// The sketch is cut into virtual shards that never touch each other. A shard is `num_buckets`
// buckets of kSlots slots, and `num_hot_rows` hot rows. A slot holds (key, score, hot row). Nothing
// is encoded in the key: whether a slot is free, cold or hot is read from its hot row alone, so
// that every int64 is an ordinary key.
#pragma once

#include <cstdint>
#include <cstring>

#include "hash.h"

namespace torchrec_cafe {

inline constexpr int kSlots = 4;         // slots of a bucket; one bucket is one 64-byte cache line
inline constexpr int32_t kFree = -2;     // hot_rows[slot]: the slot holds no key
inline constexpr int32_t kCold = -1;     // hot_rows[slot]: the slot's key owns no hot row
inline constexpr int32_t kNoOwner = -1;  // owners[row]: no slot owns this hot row

inline constexpr int8_t kKeepRow = 0;  // actions[row]: nothing changed
inline constexpr int8_t kCopyRow = 1;  // actions[row]: the row has a new owner; copy its shared row
inline constexpr int8_t kClearRow = 2;  // actions[row]: the row lost its owner; clear it

// One virtual shard: pointers to its part of the state tensors.
struct HotSketchShard {
  int64_t* keys;      // [num_buckets * kSlots]
  float* scores;      // [num_buckets * kSlots], >= 0
  int32_t* hot_rows;  // [num_buckets * kSlots]: kFree, kCold, or the hot row that the key owns
  int32_t* owners;    // [num_hot_rows]: the slot that owns the row, or kNoOwner
  int64_t num_buckets;
  int64_t num_hot_rows;

  CAFE_HOST_DEVICE int64_t num_slots() const { return num_buckets * kSlots; }

  // First slot of the bucket of `key`.
  CAFE_HOST_DEVICE int64_t bucket(int64_t key) const {
    return reduce_hash(hash64(static_cast<uint64_t>(key)), num_buckets) * kSlots;
  }

  // The slot that holds `key`, or -1.
  CAFE_HOST_DEVICE int64_t find(int64_t key) const {
    const int64_t first = bucket(key);
    for (int64_t slot = first; slot < first + kSlots; ++slot) {
      if (keys[slot] == key && hot_rows[slot] != kFree) return slot;
    }
    return -1;
  }
};

enum class Insertion { kHit, kInserted, kReplaced, kSkipped };

// Adds `score` to `key` (SpaceSaving within the bucket): a held key adds, a free slot takes the
// newcomer, and in a full bucket the newcomer replaces the smallest cold slot and inherits its
// score, so that an estimate never falls below the truth. Hot slots are not evicted here but only
// by `rebalance`, which frees their rows: a bucket full of hot keys skips the newcomer.
CAFE_HOST_DEVICE inline Insertion insert(const HotSketchShard& shard, int64_t key, float score) {
  const int64_t first = shard.bucket(key);
  int64_t free_slot = -1;
  int64_t victim = -1;
  for (int64_t slot = first; slot < first + kSlots; ++slot) {
    const int32_t row = shard.hot_rows[slot];
    if (row == kFree) {
      if (free_slot < 0) free_slot = slot;
    } else if (shard.keys[slot] == key) {
      shard.scores[slot] += score;
      return Insertion::kHit;
    } else if (row == kCold && (victim < 0 || shard.scores[slot] < shard.scores[victim])) {
      victim = slot;
    }
  }
  if (free_slot >= 0) {
    shard.keys[free_slot] = key;
    shard.scores[free_slot] = score;
    shard.hot_rows[free_slot] = kCold;
    return Insertion::kInserted;
  }
  if (victim < 0) return Insertion::kSkipped;
  shard.keys[victim] = key;
  shard.scores[victim] += score;
  return Insertion::kReplaced;
}

CAFE_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// The scores that `nth_largest` looks at.
enum class Candidates {
  kAll,   // every held key
  kCold,  // keys without a hot row whose score is at least `floor`
};

CAFE_HOST_DEVICE inline bool is_candidate(const HotSketchShard& shard, int64_t slot,
                                          Candidates which, float floor) {
  const int32_t row = shard.hot_rows[slot];
  if (which == Candidates::kAll) return row != kFree;
  return row == kCold && shard.scores[slot] >= floor;
}

CAFE_HOST_DEVICE inline int64_t count_candidates(const HotSketchShard& shard, Candidates which,
                                                 float floor) {
  int64_t count = 0;
  for (int64_t slot = 0; slot < shard.num_slots(); ++slot) {
    count += is_candidate(shard, slot, which, floor);
  }
  return count;
}

// The n-th largest candidate score, 1 <= n <= number of candidates. Scores are not negative, so
// that their bit patterns sort like they do; four rounds of a 256-bin radix select need no extra
// memory.
CAFE_HOST_DEVICE inline float nth_largest(const HotSketchShard& shard, int64_t n, Candidates which,
                                          float floor) {
  uint32_t prefix = 0;
  uint32_t known = 0;  // mask of the bits of `prefix` that are settled
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t slot = 0; slot < shard.num_slots(); ++slot) {
      if (!is_candidate(shard, slot, which, floor)) continue;
      const uint32_t bits = float_bits(shard.scores[slot]);
      if ((bits & known) == prefix) ++histogram[(bits >> shift) & 0xffu];
    }
    int digit = 255;
    while (digit > 0 && histogram[digit] < n) n -= histogram[digit--];
    prefix |= static_cast<uint32_t>(digit) << shift;
    known |= 0xffu << shift;
  }
  float score;
  memcpy(&score, &prefix, sizeof(score));
  return score;
}

struct RebalanceCounts {
  float threshold;  // the score that the shard's hot rows cost now
  int64_t promoted;
  int64_t demoted;
};

// Gives the shard's hot rows to its highest scores.
//
// The threshold is the score of rank `num_hot_rows`, or `min_score` if that is higher. A hot key is
// demoted only when its score has fallen below (1 - hysteresis) of the threshold, so that keys at
// the border do not flap; rows that are free go to the best cold keys at or above the threshold,
// ties to the lower slot. `actions` and `new_keys`, one per hot row, say what to do to the row.
CAFE_HOST_DEVICE inline RebalanceCounts rebalance(const HotSketchShard& shard, float min_score,
                                                  float hysteresis, int8_t* actions,
                                                  int64_t* new_keys) {
  RebalanceCounts counts{min_score, 0, 0};
  if (count_candidates(shard, Candidates::kAll, 0.0f) > shard.num_hot_rows) {
    const float nth = nth_largest(shard, shard.num_hot_rows, Candidates::kAll, 0.0f);
    if (nth > min_score) counts.threshold = nth;
  }
  const float keep = counts.threshold * (1.0f - hysteresis);
  int64_t num_free = 0;
  for (int64_t row = 0; row < shard.num_hot_rows; ++row) {
    actions[row] = kKeepRow;
    new_keys[row] = 0;
    const int32_t slot = shard.owners[row];
    if (slot != kNoOwner && shard.scores[slot] < keep) {
      shard.hot_rows[slot] = kCold;
      shard.owners[row] = kNoOwner;
      actions[row] = kClearRow;
      ++counts.demoted;
    }
    num_free += shard.owners[row] == kNoOwner;
  }
  float cut = counts.threshold;  // promote above the cut, and `at_cut` keys exactly at it
  int64_t at_cut = num_free;
  const int64_t eligible = count_candidates(shard, Candidates::kCold, counts.threshold);
  if (num_free == 0 || eligible == 0) return counts;
  if (eligible > num_free) {
    cut = nth_largest(shard, num_free, Candidates::kCold, counts.threshold);
    for (int64_t slot = 0; slot < shard.num_slots(); ++slot) {
      at_cut -= shard.hot_rows[slot] == kCold && shard.scores[slot] > cut;
    }
  }
  int64_t row = 0;
  for (int64_t slot = 0; slot < shard.num_slots() && num_free > 0; ++slot) {
    if (shard.hot_rows[slot] != kCold || shard.scores[slot] < cut) continue;
    if (shard.scores[slot] == cut && at_cut-- <= 0) continue;
    while (shard.owners[row] != kNoOwner) ++row;
    shard.owners[row] = static_cast<int32_t>(slot);
    shard.hot_rows[slot] = static_cast<int32_t>(row);
    actions[row] = kCopyRow;
    new_keys[row] = shard.keys[slot];
    ++counts.promoted;
    --num_free;
  }
  return counts;
}

}  // namespace torchrec_cafe
