// Ids of two rows: what every instruction set compiles of `add_second_rows`.
// Part of kernels.cpp.
#pragma once

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

// How many buckets ahead are on their way from memory.
constexpr int64_t kMediumAhead = 32;

int64_t find_medium(const HotSketch& sketch_in, const int64_t* keys, const int32_t* shards,
                    int64_t size, uint8_t* medium) {
  const HotSketch sketch = sketch_in;
  const auto bucket = [&](int64_t i) -> const Bucket& {
    return sketch.buckets[sketch.bucket_index(shards[i] < 0 ? 0 : shards[i], keys[i])];
  };
  for (int64_t i = 0; i < size && i < kMediumAhead; ++i) __builtin_prefetch(&bucket(i));
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (i + kMediumAhead < size) __builtin_prefetch(&bucket(i + kMediumAhead));
    medium[i] = static_cast<uint8_t>(is_medium(bucket(i), keys[i]) & (shards[i] >= 0));
    found += medium[i];
  }
  return found;
}

}  // namespace
}  // namespace torchrec_cafe
