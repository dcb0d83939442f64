// Learning with several threads. Torch-free, so that tests run it under sanitizers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/select.h"

namespace torchrec_cafe {

// Divides the shards, by groups, so that every thread has about as much to do, judged by a sample.
// The division is free to be any: results do not depend on it. Returns the groups of each thread.
inline std::vector<uint64_t> divide_shards(const std::vector<Occurrences>& parts,
                                           int64_t num_threads) {
  constexpr int64_t kStride = 17;
  std::array<int64_t, kShardGroups> work{};
  for (const Occurrences& seen : parts) {
    for (int64_t i = 0; i < seen.size; i += kStride) {
      if (seen.shards[i] >= 0) ++work[seen.shards[i] % kShardGroups];
    }
  }
  std::array<int, kShardGroups> by_work;
  std::iota(by_work.begin(), by_work.end(), 0);
  std::sort(by_work.begin(), by_work.end(), [&](int a, int b) { return work[a] > work[b]; });
  std::vector<int64_t> load(num_threads, 0);
  std::vector<uint64_t> groups(num_threads, 0);
  for (const int group : by_work) {
    const auto least = std::min_element(load.begin(), load.end());
    *least += work[group];
    groups[least - load.begin()] |= uint64_t{1} << group;
  }
  return groups;
}

// Every shard belongs to one thread, which works through its occurrences part by part, in order:
// the result is that of a single thread, bit for bit.
//
// `parallel_for(tasks, run)` calls run(task) for each task in [0, tasks), on any threads, and
// returns when all are done. `events` holds num_threads * num_shards zeros.
template <typename ParallelFor>
void observe_in_parallel(const Kernels& kernels, const HotSketch& sketch,
                         const std::vector<Occurrences>& parts, int64_t num_threads, Events* events,
                         const ParallelFor& parallel_for) {
  const std::vector<uint64_t> groups = divide_shards(parts, num_threads);
  parallel_for(num_threads, [&](int64_t t) {
    for (const Occurrences& seen : parts) {
      kernels.observe_owned(sketch, seen, groups[t], events + t * sketch.num_shards);
    }
  });
}

}  // namespace torchrec_cafe
