// Learning with several threads. Torch-free, so that tests run it under sanitizers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"

namespace torchrec_cafe {

// Divides the shards so that every thread has about as much to do, judged by a sample. The division
// is free to be any: results do not depend on it. Returns, for each thread, the `owned` argument of
// Kernels::observe_owned; shard -1, which is not tracked, is nobody's.
inline std::vector<std::vector<int32_t>> divide_shards(const Occurrences& seen, int64_t num_shards,
                                                       int64_t num_threads) {
  constexpr int64_t kStride = 17;
  std::vector<int64_t> work(num_shards, 1);
  for (int64_t i = 0; i < seen.size; i += kStride) {
    if (seen.shards[i] >= 0) work[seen.shards[i]] += kStride;
  }
  std::vector<int64_t> by_work(num_shards);
  std::iota(by_work.begin(), by_work.end(), 0);
  std::sort(by_work.begin(), by_work.end(),
            [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  std::vector<int64_t> load(num_threads, 0);
  std::vector<std::vector<int32_t>> owned(num_threads, std::vector<int32_t>(num_shards + 1, 0));
  for (const int64_t shard : by_work) {
    const auto least = std::min_element(load.begin(), load.end());
    *least += work[shard];
    owned[least - load.begin()][shard + 1] = -1;
  }
  return owned;
}

// Every shard belongs to one thread, which works through its occurrences in batch order: the result
// is that of a single thread, bit for bit.
//
// `parallel_for(tasks, run)` calls run(task) for each task in [0, tasks), on any threads, and
// returns when all are done. `events` holds num_threads * num_shards zeros.
template <typename ParallelFor>
void observe_in_parallel(const Kernels& kernels, const HotSketch& sketch, const Occurrences& seen,
                         int64_t num_threads, Events* events, const ParallelFor& parallel_for) {
  const auto owned = divide_shards(seen, sketch.num_shards, num_threads);
  parallel_for(num_threads, [&](int64_t t) {
    kernels.observe_owned(sketch, seen, owned[t].data(), events + t * sketch.num_shards);
  });
}

}  // namespace torchrec_cafe
