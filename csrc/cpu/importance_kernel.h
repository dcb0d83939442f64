// Importance of bags and occurrences: what every instruction set compiles of `learn`.
// Part of kernels.cpp.
#pragma once

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

void bag_norms(const float* grad, int64_t dim, const int64_t* columns, int64_t num_columns,
               int64_t num_features, int64_t num_samples, float* norms, int64_t stride,
               NormSum* sums) {
  const int64_t sample = num_features * dim;
  const int64_t ahead = 1 + kBytesAhead / (1 + num_columns * dim * 4);
  for (int64_t b = 0; b < num_samples; ++b, grad += sample) {
    if (b + ahead < num_samples) ask_for_bags(grad + ahead * sample, dim, columns, num_columns);
    for (int64_t c = 0; c < num_columns; ++c) {
      const float norm = l2_norm(grad + columns[c] * dim, dim);
      norms[c * stride + b] = norm;
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
