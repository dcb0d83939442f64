// Which weights make up an id's factor: a split block Bloom filter whose bits are weights.
// Torch-free.
//
// All weights of an id lie in one line of sixteen, one in each of as many parts of it: an id costs
// one cache miss and one row of FBGEMM, and its weights are as many as its hash functions.
#pragma once

#include <cstdint>

#include "hash.h"

namespace torchrec_cafe {

// Weights of a line: 64 bytes, and a row of FBGEMM.
inline constexpr int kLineWeights = 16;
// Hash functions of a factor at most: each part of a line has a weight then.
inline constexpr int kMaxLineHashes = kLineWeights;

struct LineEncoder {
  // The first hash gives the line and four weights, each further one eight.
  static constexpr int kHashes = 3;
  static constexpr int kFirstBytes = 4;
  // Apart from those of MEM-REC, see BloomEncoder.
  static constexpr uint64_t kFirstSalt = 17;

  int64_t shards_held;  // on this rank, > 0
  uint32_t lines_per_shard;
  int num_hashes;
  uint64_t salts[kHashes];

  CAFE_HOST_DEVICE LineEncoder(int64_t held, int64_t weights_per_shard, int hashes)
      : shards_held(held),
        lines_per_shard(static_cast<uint32_t>(weights_per_shard / kLineWeights)),
        num_hashes(hashes),
        salts{} {
    for (int i = 0; i < kHashes; ++i) salts[i] = hash64(kFirstSalt + static_cast<uint64_t>(i));
  }

  CAFE_HOST_DEVICE int64_t num_lines() const { return shards_held * lines_per_shard; }

  // The i-th hash of a key.
  CAFE_HOST_DEVICE uint64_t hash(int64_t key, int i) const {
    return hash64(static_cast<uint64_t>(key) ^ salts[i]);
  }

  // The line of a key in a shard of this rank, by its first hash.
  CAFE_HOST_DEVICE int64_t line(uint64_t first_hash, int64_t shard) const {
    return shard * lines_per_shard + reduce_hash(first_hash, lines_per_shard);
  }

  // Which hash gives the weight in a part of the line, and by which of its bits.
  CAFE_HOST_DEVICE static int hash_of_part(int part) {
    return part < kFirstBytes ? 0 : 1 + (part - kFirstBytes) / 8;
  }
  CAFE_HOST_DEVICE static int shift_of_part(int part) {
    return 8 * (part < kFirstBytes ? part : (part - kFirstBytes) % 8);
  }

  // The weight in a part of the line, as a mask of the line's weights.
  CAFE_HOST_DEVICE uint32_t weight(uint64_t hash, int part) const {
    const int first = kLineWeights * part / num_hashes;
    const int size = kLineWeights * (part + 1) / num_hashes - first;
    const auto byte = static_cast<uint32_t>(hash >> shift_of_part(part)) & 0xffu;
    return 1u << (first + static_cast<int>(byte * static_cast<uint32_t>(size) >> 8));
  }

  // The weights of a key, as a mask of its line's.
  CAFE_HOST_DEVICE uint32_t weights(int64_t key, uint64_t first_hash) const {
    uint32_t mask = 0;
    uint64_t hashes = first_hash;
    for (int part = 0; part < num_hashes; ++part) {
      if (shift_of_part(part) == 0 && part > 0) hashes = hash(key, hash_of_part(part));
      mask |= weight(hashes, part);
    }
    return mask;
  }
};

// The sum of some weights of a line: the upper half is added to the lower, four times.
CAFE_HOST_DEVICE inline float sum_of_line(const float* line, uint32_t mask) {
  float sums[kLineWeights];
  for (int i = 0; i < kLineWeights; ++i) sums[i] = (mask >> i & 1u) != 0 ? line[i] : 0.0f;
  for (int half = kLineWeights / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace torchrec_cafe
