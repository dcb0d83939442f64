// Rows of floats or halves: loads and scalar products. Part of kernels.cpp.
#pragma once

#include <cstring>

#include "cpu/kernels.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace torchrec_cafe {
namespace {

inline float float_of_half(uint16_t half) {
  // Exponent and mantissa move to their places; the product corrects the exponent's bias, also of
  // numbers below the smallest normal one. Infinities and NaNs have the largest exponent.
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Sixteen floats: a vector register, or some.
typedef float Floats __attribute__((vector_size(64)));
constexpr int kFloats = 16;

inline void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof(to)); }

inline void load(const uint16_t* from, Floats& to) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m512 floats = _mm512_maskz_cvtph_ps(0xffff, halves);  // GCC 12 warns of the unmasked one
  std::memcpy(&to, &floats, sizeof(to));
#elif defined(__F16C__)
  for (int part = 0; part < 2; ++part) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + part);
    const __m256 floats = _mm256_cvtph_ps(halves);
    std::memcpy(reinterpret_cast<char*>(&to) + 32 * part, &floats, 32);
  }
#else
  for (int i = 0; i < kFloats; ++i) to[i] = float_of_half(from[i]);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t half) { return float_of_half(half); }

typedef float EightFloats __attribute__((vector_size(32)));
typedef float FourFloats __attribute__((vector_size(16)));

// The sum of sixteen floats: the upper half is added to the lower, four times.
inline float add_up(const Floats& sums) {
  EightFloats eight[2];
  std::memcpy(eight, &sums, sizeof(eight));
  const EightFloats halved = eight[0] + eight[1];
  FourFloats four[2];
  std::memcpy(four, &halved, sizeof(four));
  const FourFloats quarter = four[0] + four[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// The scalar product of two rows, in an order of additions that no instruction set changes.
template <typename T>
inline float dot(const float* left, const T* right, int64_t dim) {
  Floats sums = {};
  int64_t d = 0;
  for (; d + kFloats <= dim; d += kFloats) {
    Floats x, y;
    load(left + d, x);
    load(right + d, y);
    sums += x * y;
  }
  float total = add_up(sums);
  for (; d < dim; ++d) total += left[d] * to_float(right[d]);
  return total;
}

// Inlined for sure: GCC takes a function that does nothing but ask for one that does nothing.
__attribute__((always_inline)) inline void ask_for(const void* row, int64_t bytes) {
  const auto* from = static_cast<const char*>(row);
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

}  // namespace
}  // namespace torchrec_cafe
