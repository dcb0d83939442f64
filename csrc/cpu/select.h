// Which occurrences of a batch are a thread's. Torch-free.
#pragma once

#include <cstdint>

#include "hash.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace torchrec_cafe {

// Threads divide the shards by their last six bits.
inline constexpr int kShardGroups = 64;

// Writes the positions in [begin, end) whose shard s is tracked and has bit s % 64 set in `groups`,
// in ascending order, and returns how many they are. May overwrite as many elements of `positions`
// as there are positions, and three more.
CAFE_HOST_DEVICE inline int select_scalar(const int32_t* shards, int64_t begin, int64_t end,
                                          uint64_t groups, int32_t* positions) {
  int found = 0;
  for (int64_t i = begin; i < end; ++i) {
    positions[found] = static_cast<int32_t>(i);
    const uint64_t mine = groups >> (static_cast<uint32_t>(shards[i]) % kShardGroups) & 1;
    found += static_cast<int>(mine & (shards[i] >= 0));
  }
  return found;
}

#if defined(__AVX2__)

CAFE_HOST_DEVICE inline int select(const int32_t* shards, int64_t begin, int64_t end,
                                   uint64_t groups, int32_t* positions) {
  // For each mask of four lanes, its lanes in ascending order.
  alignas(16) static constexpr int32_t kLanes[16][4] = {
      {0, 0, 0, 0}, {0, 0, 0, 0}, {1, 0, 0, 0}, {0, 1, 0, 0}, {2, 0, 0, 0}, {0, 2, 0, 0},
      {1, 2, 0, 0}, {0, 1, 2, 0}, {3, 0, 0, 0}, {0, 3, 0, 0}, {1, 3, 0, 0}, {0, 1, 3, 0},
      {2, 3, 0, 0}, {0, 2, 3, 0}, {1, 2, 3, 0}, {0, 1, 2, 3}};
  const __m256i all = _mm256_set1_epi64x(static_cast<int64_t>(groups));
  // The sign stays: a shift by more than 63 gives 0, and so -1 is nobody's.
  const __m128i sign_and_group = _mm_set1_epi32(static_cast<int32_t>(0x80000000u) | 63);
  int found = 0;
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    const __m128i shard = _mm_loadu_si128(reinterpret_cast<const __m128i*>(shards + i));
    const __m256i group = _mm256_cvtepu32_epi64(_mm_and_si128(shard, sign_and_group));
    const __m256i mine = _mm256_slli_epi64(_mm256_srlv_epi64(all, group), 63);
    const int mask = _mm256_movemask_pd(_mm256_castsi256_pd(mine));
    const __m128i lanes = _mm_load_si128(reinterpret_cast<const __m128i*>(kLanes[mask]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(positions + found),
                     _mm_add_epi32(lanes, _mm_set1_epi32(static_cast<int32_t>(i))));
    found += __builtin_popcount(static_cast<unsigned>(mask));
  }
  return found + select_scalar(shards, i, end, groups, positions + found);
}

#else

CAFE_HOST_DEVICE inline int select(const int32_t* shards, int64_t begin, int64_t end,
                                   uint64_t groups, int32_t* positions) {
  return select_scalar(shards, begin, end, groups, positions);
}

#endif

}  // namespace torchrec_cafe
