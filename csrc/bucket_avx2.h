// bucket.h's two functions on all slots at once. Same results bit for bit. Included by bucket.h.
//
// No branch depends on the data: whether a key is held is a coin toss on real streams, and a wrong
// guess costs as much as all of the work.
#pragma once

#include <immintrin.h>

#include "bucket.h"

namespace torchrec_cafe {

// Lanes with the key, as a mask of 32-bit lanes.
CAFE_HOST_DEVICE inline __m128i lanes_with_key(__m256i keys, __m256i key) {
  const __m256 equal = _mm256_castsi256_ps(_mm256_cmpeq_epi64(keys, key));
  const __m128 low = _mm256_castps256_ps128(equal);
  const __m128 high = _mm256_extractf128_ps(equal, 1);
  return _mm_castps_si128(_mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
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

CAFE_HOST_DEVICE inline Insertion insert(Bucket& bucket, int64_t key, float score) {
  // Lane masks by the movemask of the lanes to choose from: the lowest of them.
  alignas(16) static constexpr int32_t kLowest[16][4] = {
      {0, 0, 0, 0},  {-1, 0, 0, 0}, {0, -1, 0, 0}, {-1, 0, 0, 0}, {0, 0, -1, 0}, {-1, 0, 0, 0},
      {0, -1, 0, 0}, {-1, 0, 0, 0}, {0, 0, 0, -1}, {-1, 0, 0, 0}, {0, -1, 0, 0}, {-1, 0, 0, 0},
      {0, 0, -1, 0}, {-1, 0, 0, 0}, {0, -1, 0, 0}, {-1, 0, 0, 0}};
  constexpr int32_t kNever = 0x7fffffff;
  const __m128i minus_one = _mm_set1_epi32(-1);
  const __m256i keys = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bucket.keys));
  const __m128 scores = _mm_loadu_ps(bucket.scores);
  const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bucket.hot_rows));
  const __m256i key4 = _mm256_set1_epi64x(key);
  const __m128 score4 = _mm_set1_ps(score);

  const __m128i is_hot = _mm_cmpgt_epi32(rows, minus_one);
  const __m128i is_free = _mm_cmpeq_epi32(rows, _mm_set1_epi32(kFree));
  __m128i rank = _mm_blendv_epi8(_mm_castps_si128(scores), _mm_set1_epi32(kNever), is_hot);
  rank = _mm_blendv_epi8(rank, _mm_set1_epi32(-2), lanes_with_key(keys, key4));
  rank = _mm_blendv_epi8(rank, minus_one, is_free);
  __m128i best = _mm_min_epi32(rank, _mm_shuffle_epi32(rank, _MM_SHUFFLE(1, 0, 3, 2)));
  best = _mm_min_epi32(best, _mm_shuffle_epi32(best, _MM_SHUFFLE(2, 3, 0, 1)));
  const int32_t lowest = _mm_cvtsi128_si32(best);
  if (__builtin_expect(lowest == kNever, 0)) return kSkipped;
  const __m128i ties = _mm_cmpeq_epi32(rank, best);
  const __m128i chosen = _mm_load_si128(
      reinterpret_cast<const __m128i*>(kLowest[_mm_movemask_ps(_mm_castsi128_ps(ties))]));

  const __m128 held = _mm_castsi128_ps(_mm_cmpeq_epi32(best, _mm_set1_epi32(-2)));
  const __m128 full = _mm_castsi128_ps(_mm_cmpgt_epi32(best, minus_one));
  const __m128 left = _mm_sub_ps(scores, _mm_mul_ps(_mm_set1_ps(kWear), score4));
  const __m128 worn = _mm_and_ps(full, _mm_cmpgt_ps(left, _mm_setzero_ps()));
  __m128 sum = _mm_add_ps(_mm_and_ps(held, scores), score4);
  sum = _mm_min_ps(sum, _mm_set1_ps(kMaxScore));
  sum = _mm_blendv_ps(sum, left, worn);
  const __m128i taken = _mm_andnot_si128(_mm_castps_si128(worn), chosen);

  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bucket.keys),
                      _mm256_blendv_epi8(keys, key4, _mm256_cvtepi32_epi64(taken)));
  _mm_storeu_ps(bucket.scores, _mm_blendv_ps(scores, sum, _mm_castsi128_ps(chosen)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bucket.hot_rows),
                   _mm_blendv_epi8(rows, _mm_max_epi32(rows, minus_one), chosen));
  const bool kept = _mm_movemask_ps(_mm_and_ps(worn, _mm_castsi128_ps(chosen))) != 0;
  return static_cast<Insertion>(lowest >= 0 ? kReplaced - kept : lowest + 2);
}

}  // namespace torchrec_cafe
