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

// Rows of bags, the gradient of what each bag adds up to, and the ids that the rows are scaled for.
struct ScaledRows {
  const float* grad;  // [bags, dim]
  const void* table;  // floats, or halves
  bool half;
  int64_t dim;
  const int64_t* rows;
  const int64_t* offsets;
  const int32_t* source;    // of each row, whose it is
  const int64_t* keys;      // of each id
  const int32_t* shards;    // of each id; below 0: it has no weights
  const float* given;       // of each id, by what its rows are scaled besides; or null
  const int64_t* features;  // of a sample, those whose bags are wanted
  int64_t num_wanted;
  int64_t num_features;  // bag b * num_features + f is sample b of feature f
  int64_t num_rows;
  int64_t num_ids;
};

// The gradient of a batch's bags, of which those of some features are wanted.
struct BagGradients {
  const float* grad;  // [samples, num_features, dim]
  int64_t dim;
  int64_t num_features;
  const int64_t* columns;  // the features that are wanted, ascending
  int64_t num_columns;
  bool reads_all;  // of what lies between them, too, as memory has it
};

// What a row adds to the gradient of some weights of a line.
struct LineGradient {
  int32_t line;   // or its place, see place_lines
  uint32_t mask;  // weights of the line
  float gradient;
};

struct Kernels {
  const char* name;

  // Mixes ids of a table of n > 0; one out of range is taken as id 0. Returns how many were.
  int64_t (*mix)(const int64_t* ids, int64_t size, int64_t n, int64_t* mixed);

  // Whether all shards are in [-1, num_shards).
  bool (*shards_fit)(const int32_t* shards, int64_t size, int64_t num_shards);

  // Inserts all occurrences, in order.
  void (*observe)(const HotSketch& sketch, const Occurrences& seen, Events* events);

  // Inserts those whose shard s has bit s % kShardGroups set in `groups`, in order.
  void (*observe_owned)(const HotSketch& sketch, const Occurrences& seen, uint64_t groups,
                        Events* events);

  // Norms of the wanted bags of samples [first, last): one column after the other, `stride` apart.
  // They are added to `sums`, [num_columns].
  void (*bag_norms)(const BagGradients& in, int64_t first, int64_t last, float* norms,
                    int64_t stride, NormSum* sums);

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

  // Adds up the weights of each key; the factor of one whose shard is below 0 is 1.
  void (*key_factors)(const LineEncoder& encoder, const int64_t* keys, const int32_t* shards,
                      int64_t size, const float* weights, float* factors);

  // Takes some of `from_size` values, fewer than 2**31. Returns whether all of them exist; nothing
  // is read if not.
  bool (*gather)(const float* from, int64_t from_size, const int32_t* at, int64_t size, float* to);

  // Writes what the rows of samples [first, last) add to the gradient of weights, where a bag is
  // wanted and an id has a shard, in their order. Returns how much it was; `wrong` becomes a lookup
  // whose row or id is out of range, and has been passed over, if there is one.
  int64_t (*line_gradients)(const LineEncoder& encoder, const ScaledRows& in, int64_t first,
                            int64_t last, LineGradient* out, int64_t& wrong);

  // Puts the places of lines in the place of the lines.
  void (*place_lines)(LineGradient* added, int64_t size, RowPlaces& places);

  // Adds gradients to those in `sums`, by place; those from the `seen`-th on begin at 0. Returns
  // how many have been seen then.
  int64_t (*add_to_lines)(const LineGradient* added, int64_t size, int64_t seen, float* sums);

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
