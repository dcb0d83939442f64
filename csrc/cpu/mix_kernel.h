// Mixing of ids: what every instruction set compiles of `mix_ids`.
// Part of kernels.cpp.
#pragma once

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

// Mixes up to 64 ids in [0, n). All take a round at once; those that are not back below n go on,
// moved together, so that nothing depends on a guess about which.
inline void mix_block(const Mixer& mixer, uint64_t* __restrict__ x, int size) {
  for (int i = 0; i < size; ++i) x[i] = mixer.round(x[i]);
  int at[64];
  uint64_t rest[64];
  int left = 0;
  for (int i = 0; i < size; ++i) {
    at[left] = i;
    rest[left] = x[i];
    left += x[i] >= mixer.n;
  }
  while (left > 0) {
    for (int i = 0; i < left; ++i) rest[i] = mixer.round(rest[i]);
    int still = 0;
    for (int i = 0; i < left; ++i) {
      x[at[i]] = rest[i];
      at[still] = at[i];
      rest[still] = rest[i];
      still += rest[i] >= mixer.n;
    }
    left = still;
  }
}

int64_t mix(const int64_t* ids, int64_t size, int64_t n, int64_t* mixed) {
  const Mixer mixer(n);
  int64_t out_of_range = 0;
  for (int64_t first = 0; first < size; first += 64) {
    const int count = static_cast<int>(size - first < 64 ? size - first : 64);
    uint64_t x[64];
    for (int i = 0; i < count; ++i) {
      const bool valid = static_cast<uint64_t>(ids[first + i]) < mixer.n;
      x[i] = valid ? static_cast<uint64_t>(ids[first + i]) : 0;
      out_of_range += !valid;
    }
    if (!mixer.is_identity()) mix_block(mixer, x, count);
    for (int i = 0; i < count; ++i) mixed[first + i] = static_cast<int64_t>(x[i]);
  }
  return out_of_range;
}

}  // namespace
}  // namespace torchrec_cafe
