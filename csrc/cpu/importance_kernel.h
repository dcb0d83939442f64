// Importance of bags and occurrences: what every instruction set compiles of `learn`.
// Part of kernels.cpp.
#pragma once

#include <cstring>

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

// Bytes of gradient to ask for ahead of their use. The processor does not do it by itself: the
// tracked features of a sample lie apart, and those of the next sample on other pages.
constexpr int64_t kBytesAhead = 4096;
constexpr int64_t kFloatsPerLine = 16;

__attribute__((always_inline)) inline void ask_for_bags(const float* grad, int64_t dim,
                                                        const int64_t* columns,
                                                        int64_t num_columns) {
  for (int64_t c = 0; c < num_columns; ++c) {
    const float* bag = grad + columns[c] * dim;
    for (int64_t d = 0; d < dim; d += kFloatsPerLine) __builtin_prefetch(bag + d);
  }
}

// Reads a number of each cache line, for the sake of the processor's prefetcher: it runs far ahead
// of a program that reads line after line.
__attribute__((always_inline)) inline void read_lines(const float* begin, const float* end) {
  uint32_t all = 0;
  for (; begin < end; begin += kFloatsPerLine) {
    uint32_t bits;
    std::memcpy(&bits, begin, sizeof(bits));
    all |= bits;
  }
  asm volatile("" ::"r"(all));  // or the compiler would see that nobody wants to know
}

void bag_norms(const BagGradients& in_in, int64_t first, int64_t last, float* norms, int64_t stride,
               NormSum* sums) {
  const BagGradients in = in_in;  // in registers
  const int64_t sample = in.num_features * in.dim;
  const int64_t ahead = 1 + kBytesAhead / (1 + in.num_columns * in.dim * 4);
  const float* grad = in.grad + first * sample;
  const float* next = grad;
  for (int64_t b = first; b < last; ++b, grad += sample) {
    if (!in.reads_all && b + ahead < last) {
      ask_for_bags(grad + ahead * sample, in.dim, in.columns, in.num_columns);
    }
    for (int64_t c = 0; c < in.num_columns; ++c) {
      const float* bag = grad + in.columns[c] * in.dim;
      if (in.reads_all) read_lines(next, bag);
      next = bag + in.dim;
      const float norm = l2_norm(bag, in.dim);
      norms[c * stride + (b - first)] = norm;
      sums[c].add(norm);
    }
  }
}

void weigh(const float* __restrict__ norms, float scale, const int64_t* offsets,
           int64_t num_samples, const float* __restrict__ weights, float* __restrict__ importance) {
  const int64_t begin = offsets[0];
  const int64_t end = offsets[num_samples];
  bool one_hot = end - begin == num_samples;
  for (int64_t b = 0; one_hot && b < num_samples; ++b) one_hot = offsets[b] == begin + b;
  if (one_hot) {
    for (int64_t b = 0; b < num_samples; ++b) importance[begin + b] = norms[b] * scale;
  } else {
    for (int64_t b = 0; b < num_samples; ++b) {
      const float norm = norms[b] * scale;
      for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) importance[i] = norm;
    }
  }
  if (weights == nullptr) return;
  for (int64_t i = begin; i < end; ++i) {
    importance[i] *= weights[i] < 0.0f ? -weights[i] : weights[i];
  }
}

}  // namespace
}  // namespace torchrec_cafe
