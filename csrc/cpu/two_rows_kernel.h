// Ids of two rows: what every instruction set compiles of `add_second_rows`.
// Part of kernels.cpp.
#pragma once

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

// How many buckets ahead are on their way from memory.
constexpr int64_t kMediumAhead = 32;

int64_t find_medium(const HotSketch& sketch_in, const int32_t* source, const int64_t* keys,
                    const int32_t* shards, int64_t size, uint8_t* medium) {
  const HotSketch sketch = sketch_in;
  // Keys that are not tracked have no meaning, but any bucket does for them.
  const auto bucket = [&](int64_t i) -> const Bucket& {
    const int32_t shard = shards[source[i]];
    return sketch.buckets[sketch.bucket_index(shard < 0 ? 0 : shard, keys[source[i]])];
  };
  for (int64_t i = 0; i < size && i < kMediumAhead; ++i) __builtin_prefetch(&bucket(i));
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (i + kMediumAhead < size) __builtin_prefetch(&bucket(i + kMediumAhead));
    const bool tracked = shards[source[i]] >= 0;
    medium[i] = static_cast<uint8_t>(is_medium(bucket(i), keys[source[i]]) & tracked);
    found += medium[i];
  }
  return found;
}

}  // namespace
}  // namespace torchrec_cafe
