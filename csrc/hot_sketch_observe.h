// One step of learning for one virtual shard of HotSketch. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>

#include "hot_sketch.h"

namespace torchrec_cafe {

// Columns of the `counters` tensor, int64 [shards, kCounters].
enum Counter { kNonFinite, kSkippedKeys, kReplacedKeys, kPromoted, kDemoted, kCounters };

// Scores grow with the inflation; before they could overflow float32 both are scaled by a power of
// two, which keeps every bit of every score and so the order of the scores.
inline constexpr double kInflationLimit = 0x1p60;
inline constexpr float kRenormalise = 0x1p-60f;

// Occurrences of one shard: `order[0..size)` are positions in `keys` and `importance`.
struct Occurrences {
  const int32_t* order;
  int64_t size;
  const int64_t* keys;
  const float* importance;
};

struct ShardStatistics {
  double* norms;       // [num_tables, 2]: running sum and running count of each table's importance
  int64_t num_tables;  // 0: importance is taken as it is
  double* inflation;   // scalar
  int64_t* counters;   // [kCounters]
};

// x is finite and >= 0.
CAFE_HOST_DEVICE inline bool is_importance(float x) { return x >= 0.0f && x <= 3.402823466e+38f; }

// Table of a key, see row_map.h.
CAFE_HOST_DEVICE inline int64_t table_of(int64_t key) { return key >> 48; }

// Decays everything learned so far by `growth` (new scores count `growth` times more than those of
// the step before), then adds the importance of each occurrence, divided by the running mean of its
// table, in the order given. Importance that is not a finite number >= 0 is counted and skipped.
CAFE_HOST_DEVICE inline void observe(const HotSketchShard& shard, const Occurrences& seen,
                                     const ShardStatistics& stats, double growth,
                                     double norm_decay) {
  *stats.inflation *= growth;
  if (*stats.inflation > kInflationLimit) {
    *stats.inflation *= kRenormalise;
    for (int64_t slot = 0; slot < shard.num_slots(); ++slot) shard.scores[slot] *= kRenormalise;
  }
  for (int64_t i = 0; i < 2 * stats.num_tables; ++i) stats.norms[i] *= norm_decay;
  for (int64_t i = 0; i < seen.size && stats.num_tables > 0; ++i) {
    const float importance = seen.importance[seen.order[i]];
    if (!is_importance(importance)) continue;
    double* norm = stats.norms + 2 * table_of(seen.keys[seen.order[i]]);
    norm[0] += importance;
    norm[1] += 1.0;
  }
  for (int64_t i = 0; i < seen.size; ++i) {
    const int64_t key = seen.keys[seen.order[i]];
    const float importance = seen.importance[seen.order[i]];
    if (!is_importance(importance)) {
      ++stats.counters[kNonFinite];
      continue;
    }
    double score = importance * *stats.inflation;
    if (stats.num_tables > 0) {
      const double* norm = stats.norms + 2 * table_of(key);
      score = norm[0] > 0.0 ? score * norm[1] / norm[0] : 0.0;
    }
    switch (insert(shard, key, static_cast<float>(score))) {
      case Insertion::kSkipped:
        ++stats.counters[kSkippedKeys];
        break;
      case Insertion::kReplaced:
        ++stats.counters[kReplacedKeys];
        break;
      default:
        break;
    }
  }
}

}  // namespace torchrec_cafe
