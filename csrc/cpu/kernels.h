// The loops of the CPU operators. Torch-free: kernels.cpp is compiled once for each instruction
// set, and `kernels()` is the best one for the machine it runs on.
#pragma once

#include <cstdint>

#include "bloom.h"
#include "cpu/row_places.h"
#include "factor_lines.h"
#include "hot_sketch.h"
#include "importance.h"
#include "row_map.h"

namespace torchrec_cafe {

// Occurrences to learn from, in batch order.
struct Occurrences {
  const int64_t* keys;
  const int32_t* shards;  // -1: not tracked
  const float* importance;
  const double* inflation;  // of each shard
  bool same_inflation;      // of all shards
  int64_t size;
};

// What a thread has seen in one shard.
struct Events {
  int64_t insertions;  // sum of what `insert` returned
  int64_t non_finite;

  int64_t replaced() const { return insertions % kSkipped; }
  int64_t skipped() const { return insertions / kSkipped; }
};

struct RemapInput {
  const int64_t* ids;
  const int64_t* offsets;
};

struct RemapOutput {
  int64_t* rows;
  int64_t* offsets;
  int32_t* source;  // or null
  int64_t* keys;    // of the ids as they come; null without hot rows
  int32_t* shards;
  int32_t* second;       // of `rows`; null without second rows
  int32_t* cold_shards;  // as `shards`, below 0 for hot ids too; or null
};

// A batch of ids, feature-major, and the two tables of MEM-REC.
struct BloomLookup {
  const int64_t* ids;
  const int64_t* offsets;
  const Table* tables;  // of each feature
  int64_t num_features;
  int64_t batch_size;
  BloomEncoder token_rows;
  BloomEncoder token_weights;
  const void* rows;  // floats, or halves
  bool half;
  int64_t dim;
  const float* weights;
  const float* per_sample_weights;  // or null
  float* pooled;                    // [batch_size, num_features, dim], or null
  const float* grad;                // of `pooled`, or null
};

// Rows of bags, and the gradient of what they add up to.
struct RowDots {
  const float* grad;  // [bags, dim]
  const void* table;  // floats, or halves
  bool half;
  int64_t dim;
  const int64_t* rows;
  const int64_t* offsets;
  const int32_t* source;    // of each row; equal ones lie side by side
  const int32_t* shards;    // of each id; below 0: nothing is wanted
  const int64_t* features;  // of a sample, those whose bags are wanted
  int64_t num_wanted;
  int64_t num_features;  // bag b * num_features + f is sample b of feature f
  int64_t num_rows;
  int64_t num_ids;
};

// Keys that a CPU encodes together.
inline constexpr int kLineBlock = 64;

// Keys that have weights, encoded.
struct LineBlock {
  int64_t at[kLineBlock];  // which of the batch's keys
  int32_t lines[kLineBlock];
  uint32_t masks[kLineBlock];  // weights of the line
  int size;
};

struct Kernels {
  const char* name;

  // Mixes ids of a table of n > 0; one out of range is taken as id 0. Returns how many were.
  int64_t (*mix)(const int64_t* ids, int64_t size, int64_t n, int64_t* mixed);

  // Whether all shards are in [-1, num_shards).
  bool (*shards_fit)(const int32_t* shards, int64_t size, int64_t num_shards);

  // How many shards are not below 0.
  int64_t (*count_shards)(const int32_t* shards, int64_t size);

  // Inserts all occurrences, in order.
  void (*observe)(const HotSketch& sketch, const Occurrences& seen, Events* events);

  // Inserts those whose shard s has bit s % kShardGroups set in `groups`, in order.
  void (*observe_owned)(const HotSketch& sketch, const Occurrences& seen, uint64_t groups,
                        Events* events);

  // Norms of the bags of some samples, in the columns given: one column after the other, `stride`
  // apart. They are added to `sums`, [num_columns].
  void (*bag_norms)(const float* grad, int64_t dim, const int64_t* columns, int64_t num_columns,
                    int64_t num_features, int64_t num_samples, float* norms, int64_t stride,
                    NormSum* sums);

  // Importance of the occurrences of the bags of a feature: the norm of the bag, times the scale,
  // times the magnitude of the weight if there are weights.
  void (*weigh)(const float* norms, float scale, const int64_t* offsets, int64_t num_samples,
                const float* weights, float* importance);

  // Multiplies the scores of a shard by kRenormalise.
  void (*renormalise)(Bucket* buckets, int64_t num_buckets);

  // Whether the offsets ascend.
  bool (*offsets_ascend)(const int64_t* offsets, int64_t size);

  // Maps the ids of samples [begin, end); `sketch.num_buckets` may be 0.
  void (*remap)(const RowMap& map, const HotSketch& sketch, const RemapInput& in,
                const RemapOutput& out, int64_t begin, int64_t end);

  // Encodes at most kBloomBlock ids.
  void (*bloom_encode)(const BloomEncoder& encoder, const Table& table, const int64_t* ids,
                       int size, BloomBits& bits);

  // Encodes the next keys that have a shard, at most kLineBlock, from that at `from` on. Returns
  // where to go on, `size` at last.
  int64_t (*encode_keys)(const LineEncoder& encoder, const int64_t* keys, const int32_t* shards,
                         int64_t from, int64_t size, LineBlock& block);

  // Adds up the weights of each key; the factor of one whose shard is below 0 is 1.
  void (*key_factors)(const LineEncoder& encoder, const int64_t* keys, const int32_t* shards,
                      int64_t size, const float* weights, float* factors);

  // Adds the gradient of each key of a block to those of its weights in `sums`, where its line has
  // a place; a new one begins at 0.
  void (*add_to_lines)(const LineBlock& block, const float* gradients, RowPlaces& places,
                       float* sums);

  // Multiplies the gradient of each wanted bag of samples [first, last) with the rows of those of
  // its ids that have a shard; see row_dots. Returns a lookup whose row or id is out of range, and
  // has been passed over, -1 if there is none.
  int64_t (*row_dots)(const RowDots& in, int64_t first, int64_t last, float* dots);

  // Adds up the weights of each id.
  void (*bloom_factors)(const BloomEncoder& encoder, const Table& table, const int64_t* ids,
                        int64_t size, const float* weights, float* factors);

  // Adds up the scaled token rows of each bag of samples [first, last) of a feature.
  void (*bloom_pool)(const BloomLookup& in, int64_t feature, int64_t first, int64_t last);

  // Writes for each id of the bags of samples [first, last) of a feature the gradient of its
  // factor: that of its bag times its token rows.
  void (*bloom_dots)(const BloomLookup& in, int64_t feature, int64_t first, int64_t last,
                     float* dots);

  // Gives a shard's hot rows to its highest scores and makes the next `num_medium` medium; see
  // torchrec_cafe.ops.rebalance. `promoted` and `demoted` are added to.
  void (*rebalance)(const Shard& shard, float min_score, float hysteresis, int64_t num_medium,
                    int8_t* actions, int64_t* new_keys, int64_t* promoted, int64_t* demoted);
};

// The best that the machine can run, or the one that the environment variable CAFE_CPU_CAPABILITY
// names: "avx512", "avx2" or "default".
const Kernels& kernels();

}  // namespace torchrec_cafe
