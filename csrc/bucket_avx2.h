// bucket.h's functions on all slots at once. Same results bit for bit. Included by bucket.h.
//
// No branch depends on the data: whether a key is held is a coin toss on real streams, and a wrong
// guess costs as much as all of the work.
#pragma once

#include <immintrin.h>

#include "bucket.h"

namespace torchrec_cafe {

// Lanes with the key, as a mask of 32-bit lanes.
CAFE_HOST_DEVICE inline __m128i lanes_with_key(__m256i keys, __m256i key) {
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const __m256i equal = _mm256_cmpeq_epi64(keys, key);
  return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(equal, even));
}

CAFE_HOST_DEVICE inline int32_t hot_row(const Bucket& bucket, int64_t key) {
  const __m256i keys = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bucket.keys));
  const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bucket.hot_rows));
  const __m128i held = lanes_with_key(keys, _mm256_set1_epi64x(key));
  __m128i row = _mm_blendv_epi8(_mm_set1_epi32(kCold), rows, held);
  row = _mm_max_epi32(row, _mm_shuffle_epi32(row, _MM_SHUFFLE(1, 0, 3, 2)));
  row = _mm_max_epi32(row, _mm_shuffle_epi32(row, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(row);
}

CAFE_HOST_DEVICE inline bool is_medium(const Bucket& bucket, int64_t key) {
  const __m256i keys = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bucket.keys));
  const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bucket.hot_rows));
  const __m128i medium = _mm_cmpeq_epi32(rows, _mm_set1_epi32(kMedium));
  const __m128i held = lanes_with_key(keys, _mm256_set1_epi64x(key));
  return _mm_testz_si128(held, medium) == 0;
}

CAFE_HOST_DEVICE inline Insertion insert(Bucket& bucket, int64_t key, float score) {
  // Lane masks by the movemask of the lanes to choose from: the lowest of them.
  alignas(16) static constexpr int32_t kLowest[16][4] = {
      {0, 0, 0, 0},  {-1, 0, 0, 0}, {0, -1, 0, 0}, {-1, 0, 0, 0}, {0, 0, -1, 0}, {-1, 0, 0, 0},
      {0, -1, 0, 0}, {-1, 0, 0, 0}, {0, 0, 0, -1}, {-1, 0, 0, 0}, {0, -1, 0, 0}, {-1, 0, 0, 0},
      {0, 0, -1, 0}, {-1, 0, 0, 0}, {0, -1, 0, 0}, {-1, 0, 0, 0}};
  const __m128i never = _mm_set1_epi32(0x7fffffff);
  const __m128i minus_two = _mm_set1_epi32(kFree);
  const __m256i keys = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bucket.keys));
  const __m128 scores = _mm_loadu_ps(bucket.scores);
  const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bucket.hot_rows));
  const __m256i key4 = _mm256_set1_epi64x(key);
  const __m128 score4 = _mm_set1_ps(score);

  // Ranks as in insert_scalar. Hot rows alone have no sign; the mask of free slots is -1.
  const __m128i is_free = _mm_cmpeq_epi32(rows, minus_two);
  __m128i rank =
      _mm_castps_si128(_mm_blendv_ps(_mm_castsi128_ps(never), scores, _mm_castsi128_ps(rows)));
  rank = _mm_blendv_epi8(rank, minus_two, lanes_with_key(keys, key4));
  rank = _mm_or_si128(rank, is_free);
  __m128i best = _mm_min_epi32(rank, _mm_shuffle_epi32(rank, _MM_SHUFFLE(1, 0, 3, 2)));
  best = _mm_min_epi32(best, _mm_shuffle_epi32(best, _MM_SHUFFLE(2, 3, 0, 1)));
  // No lane has a rank just below `never`: in a bucket full of hot keys none is chosen.
  best = _mm_min_epi32(best, _mm_set1_epi32(0x7ffffffe));
  const int ties = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(rank, best)));
  const __m128i chosen = _mm_load_si128(reinterpret_cast<const __m128i*>(kLowest[ties]));

  // Signs are the conditions: of `best`, that the key is held or a slot is free; of `left`, that
  // nothing is left of the smallest.
  const __m128 own = _mm_castsi128_ps(best);
  const __m128 left = _mm_sub_ps(scores, _mm_mul_ps(_mm_set1_ps(kWear), score4));
  const __m128 full = _mm_blendv_ps(left, score4, left);
  const __m128 changed = _mm_blendv_ps(full, _mm_add_ps(scores, score4), own);
  const __m128 taken = _mm_and_ps(_mm_castsi128_ps(chosen), _mm_or_ps(own, left));
  // All ones is kCold, which a slot becomes when a newcomer takes it.
  const __m128i newcomer = _mm_andnot_si128(_mm_cmpeq_epi32(best, minus_two),
                                            _mm_srai_epi32(_mm_castps_si128(taken), 31));
  const __m256d taken64 = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm_castps_si128(taken)));
  const __m256d new_keys =
      _mm256_blendv_pd(_mm256_castsi256_pd(keys), _mm256_castsi256_pd(key4), taken64);

  _mm256_storeu_pd(reinterpret_cast<double*>(bucket.keys), new_keys);
  _mm_storeu_ps(bucket.scores, _mm_blendv_ps(scores, changed, _mm_castsi128_ps(chosen)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bucket.hot_rows), _mm_or_si128(rows, newcomer));
  const int64_t replaced = _mm_movemask_ps(_mm_andnot_ps(own, taken)) != 0;
  const int64_t skipped = ties == 0;
  return static_cast<Insertion>(replaced * kReplaced + skipped * kSkipped);
}

}  // namespace torchrec_cafe
