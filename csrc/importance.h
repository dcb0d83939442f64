// How much a bag matters: the norm of its gradient, in units of its table's mean. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>

#include "hot_sketch.h"

namespace torchrec_cafe {

// Samples whose norms are added up together: a fixed number, so that sums have the same bits for
// any number of threads.
inline constexpr int64_t kNormBlock = 256;

// Sum and number of the finite norms of a feature or a table.
struct NormSum {
  double sum = 0.0;
  double count = 0.0;

  CAFE_HOST_DEVICE void add(float norm) {
    const bool valid = is_importance(norm);
    sum += valid ? static_cast<double>(norm) : 0.0;
    count += valid ? 1.0 : 0.0;
  }
  CAFE_HOST_DEVICE void add(const NormSum& other) {
    sum += other.sum;
    count += other.count;
  }
  CAFE_HOST_DEVICE void decay(double factor) {
    sum *= factor;
    count *= factor;
  }
  // What a norm is multiplied by to be in units of the mean.
  CAFE_HOST_DEVICE float scale() const {
    return sum > 0.0 ? static_cast<float>(count / sum) : 0.0f;
  }
};
static_assert(sizeof(NormSum) == 16, "a row of the `norms` tensor");

// The L2 norm of `dim` numbers, a multiple of four. Squares are exact in double precision, and the
// order of their sum is fixed.
CAFE_HOST_DEVICE inline float l2_norm(const float* numbers, int64_t dim) {
  double sums[4] = {};
  for (int64_t d = 0; d < dim; d += 4) {
    for (int lane = 0; lane < 4; ++lane) {
      const auto x = static_cast<double>(numbers[d + lane]);
      sums[lane] += x * x;
    }
  }
  return static_cast<float>(sqrt((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

}  // namespace torchrec_cafe
