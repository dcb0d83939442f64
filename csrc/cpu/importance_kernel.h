// Importance of bags and occurrences: what every instruction set compiles of `learn`.
// Part of kernels.cpp.
#pragma once

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

void bag_norms(const float* grad, int64_t dim, int64_t num_features, int64_t num_samples,
               float* norms, NormSum* sums) {
  for (int64_t b = 0; b < num_samples; ++b) {
    for (int64_t f = 0; f < num_features; ++f, grad += dim, ++norms) *norms = l2_norm(grad, dim);
    for (int64_t f = 0; f < num_features; ++f) sums[f].add(norms[f - num_features]);
  }
}

void scale_norms(const float* scales, int64_t num_features, int64_t num_samples, float* norms) {
  for (int64_t b = 0; b < num_samples; ++b, norms += num_features) {
    for (int64_t f = 0; f < num_features; ++f) norms[f] *= scales[f];
  }
}

void weigh(const float* __restrict__ norms, const int32_t* __restrict__ bags,
           const float* __restrict__ weights, int64_t size, float* __restrict__ importance) {
  for (int64_t i = 0; i < size; ++i) importance[i] = norms[bags[i]];
  if (weights == nullptr) return;
  for (int64_t i = 0; i < size; ++i) importance[i] *= weights[i] < 0.0f ? -weights[i] : weights[i];
}

bool bags_fit(const int32_t* bags, int64_t size, int64_t num_bags) {
  int32_t wrong = 0;
  const auto most = static_cast<int32_t>(num_bags);
  for (int64_t i = 0; i < size; ++i) wrong |= (bags[i] < 0) | (bags[i] >= most);
  return wrong == 0;
}

}  // namespace
}  // namespace torchrec_cafe
