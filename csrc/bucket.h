// One bucket of HotSketch: a cache line of kSlots slots, and what happens to it. Torch-free.
//
// A slot holds (key, score, hot row). Nothing is encoded in the key: whether a slot is free, cold,
// medium or hot is read from its hot row alone, so that every int64 is an ordinary key.
#pragma once

#include <cstdint>
#include <cstring>

#include "hash.h"

namespace torchrec_cafe {

inline constexpr int kSlots = 4;
inline constexpr int32_t kFree = -2;    // hot_rows[slot]: the slot holds no key
inline constexpr int32_t kCold = -1;    // hot_rows[slot]: the slot's key owns no hot row
inline constexpr int32_t kMedium = -3;  // hot_rows[slot]: nor does this one's, but it is half-way

// Aligned, so that a GPU reads it in four accesses of 16 bytes that lie in one line.
struct alignas(64) Bucket {
  int64_t keys[kSlots];
  float scores[kSlots];      // >= 0 and finite
  int32_t hot_rows[kSlots];  // kFree, kCold, kMedium, or the hot row that the key owns
};
static_assert(sizeof(Bucket) == 64, "a bucket is one cache line");

// What a newcomer to a full bucket takes off the smallest cold score, as a part of its own.
inline constexpr float kWear = 0.25f;
// The largest score of one occurrence: 2^37 of them do not overflow.
inline constexpr float kMaxScore = 0x1p90f;

// What became of an occurrence. Sums of these count the last two kinds apart.
enum Insertion : int64_t {
  kAbsorbed = 0,                // the score went to the key itself, or wore off another's
  kReplaced = 1,                // the key took the slot of another
  kSkipped = int64_t{1} << 32,  // the bucket was full of hot keys: nothing happened
};

CAFE_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

CAFE_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The hot row of `key`, or a negative number if it owns none.
CAFE_HOST_DEVICE inline int32_t hot_row_scalar(const Bucket& bucket, int64_t key) {
  int32_t row = kCold;
  for (int slot = 0; slot < kSlots; ++slot) {
    row = bucket.keys[slot] == key && bucket.hot_rows[slot] >= 0 ? bucket.hot_rows[slot] : row;
  }
  return row;
}

// Whether `key` is held and medium.
CAFE_HOST_DEVICE inline bool is_medium_scalar(const Bucket& bucket, int64_t key) {
  bool medium = false;
  for (int slot = 0; slot < kSlots; ++slot) {
    medium |= (bucket.keys[slot] == key) & (bucket.hot_rows[slot] == kMedium);
  }
  return medium;
}

// Adds `score`, in [0, kMaxScore], to `key`. A held key adds, a free slot takes the newcomer. In a
// full bucket the newcomer takes kWear of its score off the smallest cold slot, and the slot itself
// if that had less, as in Elastic Sketch's ostracism (SIGCOMM 2018). Hot slots lose their rows in
// `rebalance` only: a bucket full of them skips the newcomer.
//
// SpaceSaving, where the newcomer replaces the slot at once and inherits its score, finds far fewer
// of the highest scores in the same memory: the long tail keeps on inflating the smallest slots.
// See docs/hot_sketch.md for the measurement.
CAFE_HOST_DEVICE inline Insertion insert_scalar(Bucket& bucket, int64_t key, float score) {
  constexpr int32_t kNever = 0x7fffffff;
  int32_t best = kNever;  // scores are not negative, so that their bits sort like they do
  int chosen = 0;
  for (int slot = kSlots - 1; slot >= 0; --slot) {
    const int32_t row = bucket.hot_rows[slot];
    int32_t rank = row >= 0 ? kNever : static_cast<int32_t>(float_bits(bucket.scores[slot]));
    rank = bucket.keys[slot] == key ? -2 : rank;
    rank = row == kFree ? -1 : rank;
    chosen = rank <= best ? slot : chosen;
    best = rank <= best ? rank : best;
  }
  if (best == kNever) return kSkipped;
  Insertion outcome = kAbsorbed;
  for (int slot = 0; slot < kSlots; ++slot) {  // not scores[chosen]: registers have no index
    if (slot != chosen) continue;
    const float left = bucket.scores[slot] - kWear * score;
    if (best < 0) {
      bucket.scores[slot] += score;
    } else {
      bucket.scores[slot] = left < 0.0f ? score : left;
    }
    if (best >= 0 && left >= 0.0f) continue;
    bucket.keys[slot] = key;
    bucket.hot_rows[slot] = best == -2 ? bucket.hot_rows[slot] : kCold;
    if (best >= 0) outcome = kReplaced;
  }
  return outcome;
}

}  // namespace torchrec_cafe

#if defined(__AVX2__) && !defined(__CUDA_ARCH__)
#include "bucket_avx2.h"
#else
namespace torchrec_cafe {

CAFE_HOST_DEVICE inline int32_t hot_row(const Bucket& bucket, int64_t key) {
  return hot_row_scalar(bucket, key);
}
CAFE_HOST_DEVICE inline bool is_medium(const Bucket& bucket, int64_t key) {
  return is_medium_scalar(bucket, key);
}
CAFE_HOST_DEVICE inline Insertion insert(Bucket& bucket, int64_t key, float score) {
  return insert_scalar(bucket, key, score);
}

}  // namespace torchrec_cafe
#endif
