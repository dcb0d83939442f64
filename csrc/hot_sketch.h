// HotSketch (CAFE, SIGMOD 2024, section 3.2) over plain tensors, for host and device. Torch-free.
//
// The sketch is cut into virtual shards that never touch each other. A shard is `num_buckets`
// buckets and `num_hot_rows` hot rows.
#pragma once

#include <cstdint>

#include "bucket.h"
#include "hash.h"

namespace torchrec_cafe {

inline constexpr int32_t kNoOwner = -1;  // owners[row]: no slot owns this hot row

struct HotSketch {
  Bucket* buckets;  // [num_shards * num_buckets]
  int64_t num_shards;
  int64_t num_buckets;  // of a shard, < 2^32

  // The bucket of a key, over all shards.
  CAFE_HOST_DEVICE int64_t bucket_index(int64_t shard, int64_t key) const {
    const uint64_t hash = hash64(static_cast<uint64_t>(key));
    return shard * num_buckets + reduce_hash(hash, static_cast<uint32_t>(num_buckets));
  }
};

// Columns of the `counters` tensor, int64 [shards, kCounters].
enum Counter { kNonFinite, kSkippedKeys, kReplacedKeys, kPromoted, kDemoted, kSteps, kCounters };

// --- learning ------------------------------------------------------------------------------------

// New scores grow with the inflation, which is how old ones decay. Before scores could overflow
// float32 both are scaled by a power of two: that keeps every bit of every score that matters, and
// so the order of the scores.
inline constexpr double kInflationLimit = 0x1p60;
inline constexpr float kRenormalise = 0x1p-60f;

// Lets everything learned so far decay by `growth`. Returns whether the shard's scores have to be
// multiplied by kRenormalise.
CAFE_HOST_DEVICE inline bool inflate(double& inflation, double growth) {
  inflation *= growth;
  if (inflation <= kInflationLimit) return false;
  inflation *= kRenormalise;
  return true;
}

// x is finite and >= 0.
CAFE_HOST_DEVICE inline bool is_importance(float x) {
  return (x >= 0.0f) & (x <= 3.402823466e+38f);
}

CAFE_HOST_DEVICE inline float score_of(float importance, double inflation) {
  const double score = static_cast<double>(importance) * inflation;
  return static_cast<float>(score < kMaxScore ? score : kMaxScore);
}

// --- which keys own a row ------------------------------------------------------------------------

inline constexpr int8_t kKeepRow = 0;  // actions[row]: nothing changed
inline constexpr int8_t kCopyRow = 1;  // actions[row]: the row has a new owner; copy its shared row
inline constexpr int8_t kClearRow = 2;  // actions[row]: the row lost its owner; clear it
inline constexpr int8_t kAddRow = 3;    // actions[row]: as kCopyRow, but the new owner had two rows

// The slots whose scores a RadixSelect ranks.
struct Candidates {
  int32_t most;  // hot rows above this are left out: kMaxRow for all, kCold for slots without one
  float least;   // scores below this are left out

  static constexpr int32_t kMaxRow = 0x7fffffff;

  CAFE_HOST_DEVICE bool contain(int32_t row, float score) const {
    return row != kFree && row <= most && score >= least;
  }
};

// The n-th largest of some scores by their bits, eleven or ten at a time from the top: for each
// digit a caller counts the candidates by that digit, and `settle` takes the digit of the n-th.
struct RadixSelect {
  static constexpr int kRounds = 3;
  static constexpr int kDigits = 2048;
  uint32_t prefix = 0;
  uint32_t known = 0;  // mask of the bits of `prefix` that are settled
  int64_t n;

  CAFE_HOST_DEVICE explicit RadixSelect(int64_t rank) : n(rank) {}

  CAFE_HOST_DEVICE static int shift(int round) { return round == 0 ? 21 : round == 1 ? 10 : 0; }
  CAFE_HOST_DEVICE bool matches(float score) const { return (float_bits(score) & known) == prefix; }
  CAFE_HOST_DEVICE static int digit(float score, int round) {
    return static_cast<int>((float_bits(score) >> shift(round)) & (round == 2 ? 1023u : 2047u));
  }
  CAFE_HOST_DEVICE void settle(const int32_t* counts, int round) {
    int digit = kDigits - 1;
    while (digit > 0 && counts[digit] < n) n -= counts[digit--];
    prefix |= static_cast<uint32_t>(digit) << shift(round);
    known |= (round == 2 ? 1023u : 2047u) << shift(round);
  }
  CAFE_HOST_DEVICE float score() const { return float_from_bits(prefix); }
};

// One shard's part of the state, as `rebalance` sees it.
struct Shard {
  Bucket* buckets;  // [num_buckets]
  int32_t* owners;  // [num_hot_rows]: the slot that owns the row, or kNoOwner
  int64_t num_buckets;
  int64_t num_hot_rows;

  CAFE_HOST_DEVICE float& score(int64_t slot) const {
    return buckets[slot / kSlots].scores[slot % kSlots];
  }
  CAFE_HOST_DEVICE int32_t& hot_row(int64_t slot) const {
    return buckets[slot / kSlots].hot_rows[slot % kSlots];
  }
  CAFE_HOST_DEVICE int64_t key(int64_t slot) const {
    return buckets[slot / kSlots].keys[slot % kSlots];
  }

  // Takes a row from its owner if that has fallen below `keep`. Returns what happened to the row.
  CAFE_HOST_DEVICE int8_t demote(int64_t row, float keep) const {
    const int32_t slot = owners[row];
    if (slot == kNoOwner || score(slot) >= keep) return kKeepRow;
    hot_row(slot) = kCold;
    owners[row] = kNoOwner;
    return kClearRow;
  }

  CAFE_HOST_DEVICE bool wants_row(int64_t slot) const {
    return hot_row(slot) == kCold || hot_row(slot) == kMedium;
  }

  // Gives a row to a slot without one. Returns what happened to the row.
  CAFE_HOST_DEVICE int8_t promote(int64_t slot, int64_t row) const {
    const int8_t action = hot_row(slot) == kMedium ? kAddRow : kCopyRow;
    owners[row] = static_cast<int32_t>(slot);
    hot_row(slot) = static_cast<int32_t>(row);
    return action;
  }

  // Keys without a row are medium from the threshold on, and stay it down to what keeps it.
  CAFE_HOST_DEVICE void set_medium(int64_t slot, float at_least, float keep) const {
    if (!wants_row(slot)) return;
    const float needed = hot_row(slot) == kMedium ? keep : at_least;
    hot_row(slot) = score(slot) >= needed ? kMedium : kCold;
  }
};

// What a shard's hot rows cost, from the score of rank `num_hot_rows`.
struct Threshold {
  float promote;  // a cold key needs this much to earn a row
  float keep;  // a hot key below this loses its row: lower, so that keys at the border do not flap

  CAFE_HOST_DEVICE Threshold(float nth, float min_score, float hysteresis)
      : promote(nth > min_score ? nth : min_score), keep(promote * (1.0f - hysteresis)) {}
};

}  // namespace torchrec_cafe
