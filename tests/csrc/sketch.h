// A sketch in plain memory, and what every test checks with.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <set>
#include <vector>

#include "cpu/kernels.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace torchrec_cafe {

extern const Kernels kernels_default;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// The kernels that this machine can run.
inline std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> all{&kernels_default};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v3")) all.push_back(&kernels_avx2);
  if (__builtin_cpu_supports("x86-64-v4")) all.push_back(&kernels_avx512);
#endif
  return all;
}

struct Sketch {
  std::vector<Bucket> buckets;
  std::vector<int32_t> owners;
  std::vector<double> inflation;
  HotSketch view;
  int64_t num_hot_rows;

  Sketch(int64_t shards, int64_t num_buckets, int64_t rows)
      : buckets(shards * num_buckets, Bucket{{}, {}, {kFree, kFree, kFree, kFree}}),
        owners(shards * rows, kNoOwner),
        inflation(shards, 1.0),
        view{buckets.data(), shards, num_buckets},
        num_hot_rows(rows) {}

  Bucket& bucket(int64_t key) { return buckets[view.bucket_index(0, key)]; }

  Shard shard(int64_t s) {
    return Shard{buckets.data() + s * view.num_buckets, owners.data() + s * num_hot_rows,
                 view.num_buckets, num_hot_rows};
  }

  bool holds(int64_t key) {
    const Bucket& where = bucket(key);
    for (int j = 0; j < kSlots; ++j) {
      if (where.hot_rows[j] != kFree && where.keys[j] == key) return true;
    }
    return false;
  }

  double mass() const {
    double sum = 0.0;
    for (const Bucket& where : buckets) {
      sum = std::accumulate(where.scores, where.scores + kSlots, sum);
    }
    return sum;
  }

  bool operator==(const Sketch& other) const {
    const size_t bytes = buckets.size() * sizeof(Bucket);
    return memcmp(buckets.data(), other.buckets.data(), bytes) == 0 && owners == other.owners;
  }

  // Every hot row has at most one owner, and owners and slots agree.
  void check_owners() {
    for (int64_t s = 0; s < view.num_shards; ++s) {
      const Shard part = shard(s);
      std::set<int32_t> owned;
      for (int64_t slot = 0; slot < part.num_buckets * kSlots; ++slot) {
        const int32_t row = part.hot_row(slot);
        if (row < 0) continue;
        CHECK(row < num_hot_rows && owned.insert(row).second);
        CHECK(part.owners[row] == static_cast<int32_t>(slot));
      }
      for (int64_t row = 0; row < num_hot_rows; ++row) {
        const bool is_owned = owned.count(static_cast<int32_t>(row)) != 0;
        CHECK(is_owned == (part.owners[row] != kNoOwner));
      }
    }
  }
};

}  // namespace torchrec_cafe
