// A batch of bags on the device.
#pragma once

#include "checks.h"
#include "launch.cuh"

namespace torchrec_cafe {

// The ids of a batch, feature-major. Offsets out of range are cut.
struct Batch {
  const int64_t* ids;
  const int64_t* offsets;
  const int64_t* tables;
  int64_t num_ids;
  int64_t num_features;
  int64_t batch_size;

  Batch(const Tensor& ids_in, const Tensor& offsets_in, const Tensor& tables_in)
      : ids(ids_in.const_data_ptr<int64_t>()),
        offsets(offsets_in.const_data_ptr<int64_t>()),
        tables(tables_in.const_data_ptr<int64_t>()),
        num_ids(ids_in.numel()),
        num_features(tables_in.size(0)),
        batch_size((offsets_in.numel() - 1) / num_features) {}

  __host__ __device__ int64_t num_bags() const { return num_features * batch_size; }
  __device__ int64_t begin(int64_t bag) const { return max(offsets[bag], int64_t{0}); }
  __device__ int64_t end(int64_t bag) const { return min(offsets[bag + 1], num_ids); }
};

// Bags are feature-major where they come from and sample-major where they go.
__device__ inline int64_t feature_major(const Batch& batch, int64_t bag) {
  return bag % batch.num_features * batch.batch_size + bag / batch.num_features;
}

}  // namespace torchrec_cafe
