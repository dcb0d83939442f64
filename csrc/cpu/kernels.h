// The loops of the CPU operators. Torch-free: kernels.cpp is compiled once for each instruction
// set, and `kernels()` is the best one for the machine it runs on.
#pragma once

#include <cstdint>

#include "hot_sketch.h"
#include "row_map.h"

namespace torchrec_cafe {

// Occurrences to learn from, in batch order.
struct Occurrences {
  const int64_t* keys;
  const int32_t* shards;  // -1: not tracked
  const float* importance;
  const double* inflation;  // of each shard
};

// What a thread has seen in one shard.
struct Events {
  int32_t non_finite;
  int32_t by_insertion[kSkipped + 1];
};

// Where each occurrence goes, worked out before the sketch is touched so that threads can divide
// the buckets among themselves.
struct Routing {
  int64_t* buckets;  // per occurrence
  float* scores;     // per occurrence
  int32_t*
      positions;  // occurrences of one chunk of the batch, grouped by the thread that owns them
  int32_t* ends;  // [threads]: where each thread's group ends, from the chunk's begin
};

struct RemapInput {
  const int64_t* ids;
  const int64_t* offsets;
};

struct RemapOutput {
  int64_t* rows;
  int64_t* offsets;
  int32_t* source;
  int32_t* bags;
  int64_t* keys;
  int32_t* shards;
};

struct Kernels {
  const char* name;

  // Inserts occurrences [begin, end) in order.
  void (*observe)(const HotSketch& sketch, const Occurrences& seen, int64_t begin, int64_t end,
                  Events* events);

  // Routes occurrences [begin, end) to `num_threads` threads, each occurrence to the owner of its
  // bucket; `positions` and `ends` are those of this chunk.
  void (*route)(const HotSketch& sketch, const Occurrences& seen, const Routing& routing,
                int64_t begin, int64_t end, int64_t num_threads, Events* events);

  // Inserts the occurrences at `positions`, in that order.
  void (*observe_routed)(const HotSketch& sketch, const Occurrences& seen, const Routing& routing,
                         const int32_t* positions, int64_t size, Events* events);

  // Multiplies the scores of a shard by kRenormalise.
  void (*renormalise)(Bucket* buckets, int64_t num_buckets);

  // Maps the ids of samples [begin, end); `sketch.num_buckets` may be 0.
  void (*remap)(const RowMap& map, const HotSketch& sketch, const RemapInput& in,
                const RemapOutput& out, int64_t begin, int64_t end);

  // Gives a shard's hot rows to its highest scores; see torchrec_cafe.ops.rebalance. `promoted` and
  // `demoted` are added to.
  void (*rebalance)(const Shard& shard, float min_score, float hysteresis, int8_t* actions,
                    int64_t* new_keys, int64_t* promoted, int64_t* demoted);
};

// The best of the machine, or what the environment variable CAFE_CPU_CAPABILITY names: "default" or
// "avx2".
const Kernels& kernels();

}  // namespace torchrec_cafe
