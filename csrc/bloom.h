// Bloom encodings: which bits of a shared table an id sets (MEM-REC, section 3). Torch-free.
#pragma once

#include <cstdint>

#include "hash.h"
#include "row_map.h"

namespace torchrec_cafe {

// Hash functions of an encoding, and bits that an id can set.
inline constexpr int kMaxHashes = 16;
// Weights that lie in one row of FBGEMM, whose rows have a multiple of four columns.
inline constexpr int kWeightsPerRow = 4;

// Ids that a CPU encodes together.
inline constexpr int kBloomBlock = 64;

// The bits of a block of ids, hash by hash; -1 where an earlier hash has set the same bit.
struct BloomBits {
  int32_t at[kMaxHashes][kBloomBlock];
};

// A 64-bit hash is two hash functions: its halves are independent. Salts of those of token rows and
// of weights are told apart by the number of the first.
inline constexpr int kMaxPairs = kMaxHashes / 2;
inline constexpr int kTokenPairs = 0;
inline constexpr int kWeightPairs = kMaxPairs;

// Sets bits of an id within the part of the bits that belongs to its virtual shard, so that all of
// them are on the rank that the id is sent to. `Table::shared_rows` is the number of shards.
struct BloomEncoder {
  int64_t first_shard;  // of this rank
  int64_t shards_held;  // on this rank, > 0
  uint32_t bits_per_shard;
  int num_hashes;
  uint64_t salts[kMaxPairs];

  CAFE_HOST_DEVICE BloomEncoder(int64_t first, int64_t held, int64_t per_shard, int hashes,
                                int first_pair)
      : first_shard(first),
        shards_held(held),
        bits_per_shard(static_cast<uint32_t>(per_shard)),
        num_hashes(hashes),
        salts{} {
    for (int pair = 0; 2 * pair < hashes; ++pair) {
      salts[pair] = hash64(static_cast<uint64_t>(first_pair + pair + 1));
    }
  }

  // The shard of a mixed id on this rank; the nearest if it is another rank's.
  CAFE_HOST_DEVICE int64_t held_shard(const Table& table, int64_t mixed_id) const {
    const int64_t shard = table.shared_row(mixed_id) - first_shard;
    return shard < 0 ? 0 : shard >= shards_held ? shards_held - 1 : shard;
  }

  CAFE_HOST_DEVICE uint64_t hash_pair(int64_t key, int pair) const {
    return hash64(static_cast<uint64_t>(key) ^ salts[pair]);
  }

  // The bit of the first or of the second hash function of a pair, within its shard.
  CAFE_HOST_DEVICE int64_t first_of(uint64_t hashes) const {
    return reduce_hash(hashes, bits_per_shard);
  }
  CAFE_HOST_DEVICE int64_t second_of(uint64_t hashes) const {
    return reduce_hash(hashes << 32, bits_per_shard);
  }

  // The bits of a local id, each once: a bit that two functions hit is set, not counted. Returns
  // how many.
  CAFE_HOST_DEVICE int encode(const Table& table, int64_t local_id, int64_t* bits) const {
    const int64_t mixed_id = table.first_id + local_id;
    return encode_key(table.key(mixed_id), held_shard(table, mixed_id), bits);
  }

  // The same of a key in a shard of this rank.
  CAFE_HOST_DEVICE int encode_key(int64_t key, int64_t shard, int64_t* bits) const {
    const int64_t first = shard * bits_per_shard;
    int found = 0;
    for (int i = 0; i < num_hashes; ++i) {
      const uint64_t hashes = hash_pair(key, i / 2);
      const int64_t at = first + (i % 2 == 0 ? first_of(hashes) : second_of(hashes));
      bool is_new = true;
      for (int j = 0; j < found; ++j) is_new &= bits[j] != at;
      bits[found] = at;
      found += is_new;
    }
    return found;
  }
};

}  // namespace torchrec_cafe
