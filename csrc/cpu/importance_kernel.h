// Importance of bags and occurrences: what every instruction set compiles of `learn`.
// Part of kernels.cpp.
#pragma once

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

void bag_norms(const float* grad, int64_t dim, const int64_t* columns, int64_t num_columns,
               int64_t num_features, int64_t num_samples, float* norms, NormSum* sums) {
  for (int64_t b = 0; b < num_samples; ++b, grad += num_features * dim, norms += num_features) {
    for (int64_t c = 0; c < num_columns; ++c) {
      norms[columns[c]] = l2_norm(grad + columns[c] * dim, dim);
    }
    for (int64_t c = 0; c < num_columns; ++c) sums[columns[c]].add(norms[columns[c]]);
  }
}

void weigh(const float* norms, int64_t stride, float scale, const int64_t* offsets,
           int64_t num_samples, const float* __restrict__ weights, float* __restrict__ importance) {
  const int64_t begin = offsets[0];
  const int64_t end = offsets[num_samples];
  bool one_hot = end - begin == num_samples;
  for (int64_t b = 0; one_hot && b < num_samples; ++b) one_hot = offsets[b] == begin + b;
  if (one_hot) {
    for (int64_t b = 0; b < num_samples; ++b) importance[begin + b] = norms[b * stride] * scale;
  } else {
    for (int64_t b = 0; b < num_samples; ++b) {
      const float norm = norms[b * stride] * scale;
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
