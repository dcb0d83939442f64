// Learning with several threads. Torch-free, so that tests run it under sanitizers.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace torchrec_cafe {

// Every occurrence goes to the one thread that owns its bucket, and each thread works through its
// own in batch order: the result is that of a single thread, bit for bit.
//
// `parallel_for(tasks, run)` calls run(task) for each task in [0, tasks), on any threads, and
// returns when all are done. `events` holds num_threads * num_shards zeros.
template <typename ParallelFor>
void observe_in_parallel(const Kernels& kernels, const HotSketch& sketch, const Occurrences& seen,
                         int64_t size, int64_t num_threads, Events* events,
                         const ParallelFor& parallel_for) {
  const std::unique_ptr<int64_t[]> buckets(new int64_t[size]);
  const std::unique_ptr<float[]> scores(new float[size]);
  const std::unique_ptr<int32_t[]> positions(new int32_t[size]);
  std::vector<int32_t> ends(num_threads * num_threads);
  const auto chunk_begin = [&](int64_t c) { return size * c / num_threads; };
  const auto chunk_routing = [&](int64_t c) {
    return Routing{buckets.get(), scores.get(), positions.get() + chunk_begin(c),
                   ends.data() + c * num_threads};
  };
  parallel_for(num_threads, [&](int64_t c) {
    kernels.route(sketch, seen, chunk_routing(c), chunk_begin(c), chunk_begin(c + 1), num_threads,
                  events + c * sketch.num_shards);
  });
  parallel_for(num_threads, [&](int64_t t) {
    for (int64_t c = 0; c < num_threads; ++c) {
      const Routing routing = chunk_routing(c);
      const int32_t first = t == 0 ? 0 : routing.ends[t - 1];
      kernels.observe_routed(sketch, seen, routing, routing.positions + first,
                             routing.ends[t] - first, events + t * sketch.num_shards);
    }
  });
}

}  // namespace torchrec_cafe
