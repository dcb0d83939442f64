#include <cub/device/device_radix_sort.cuh>

#include "checks.h"
#include "launch.cuh"
#include "observe.cuh"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Occurrences sorted by bucket, in batch order within a bucket.
struct SortedOccurrences {
  const uint32_t* buckets;
  const int64_t* keys;
  const float* scores;
  int64_t size;
};

__device__ void add_to(int64_t* counter, int64_t amount) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter),
            static_cast<unsigned long long>(amount));
}

// One thread per shard.
__global__ void inflate_kernel(int64_t num_shards, double growth, double* inflation,
                               int64_t* counters, int32_t* renormalise) {
  for (int64_t shard = first_index(); shard < num_shards; shard += index_stride()) {
    renormalise[shard] = inflate(inflation[shard], growth) ? 1 : 0;
    ++counters[shard * kCounters + kSteps];
  }
}

// One thread per bucket; hardly ever has anything to do.
__global__ void renormalise_kernel(HotSketch sketch, const int32_t* __restrict__ renormalise) {
  const int64_t size = sketch.num_shards * sketch.num_buckets;
  for (int64_t b = first_index(); b < size; b += index_stride()) {
    if (renormalise[b / sketch.num_buckets] == 0) continue;
    for (float& score : sketch.buckets[b].scores) score *= kRenormalise;
  }
}

// What is not tracked, or not finite, goes behind all buckets.
__global__ void route_kernel(HotSketch sketch, const int64_t* __restrict__ keys,
                             const int32_t* __restrict__ shards,
                             const float* __restrict__ importance, int64_t size,
                             uint32_t* __restrict__ buckets, int32_t* __restrict__ positions,
                             int64_t* counters) {
  const auto nowhere = static_cast<uint32_t>(sketch.num_shards * sketch.num_buckets);
  for (int64_t i = first_index(); i < size; i += index_stride()) {
    const int32_t shard = shards[i];
    const bool tracked = shard >= 0 && shard < sketch.num_shards;
    const bool valid = tracked && is_importance(importance[i]);
    if (tracked && !valid) add_to(counters + shard * kCounters + kNonFinite, 1);
    buckets[i] = valid ? static_cast<uint32_t>(sketch.bucket_index(shard, keys[i])) : nowhere;
    positions[i] = static_cast<int32_t>(i);
  }
}

__global__ void gather_kernel(HotSketch sketch, const int64_t* __restrict__ keys,
                              const float* __restrict__ importance,
                              const double* __restrict__ inflation,
                              const uint32_t* __restrict__ buckets,
                              const int32_t* __restrict__ positions, int64_t size,
                              int64_t* __restrict__ sorted_keys,
                              float* __restrict__ sorted_scores) {
  const int64_t nowhere = sketch.num_shards * sketch.num_buckets;
  for (int64_t i = first_index(); i < size; i += index_stride()) {
    if (buckets[i] >= nowhere) continue;
    sorted_keys[i] = keys[positions[i]];
    sorted_scores[i] =
        score_of(importance[positions[i]], inflation[buckets[i] / sketch.num_buckets]);
  }
}

// The whole warp applies one bucket's occurrences, the bucket in the registers of every lane.
__device__ void insert_all(const HotSketch& sketch, const SortedOccurrences& seen, int64_t begin,
                           int64_t* counters) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t index = seen.buckets[begin];
  Bucket bucket = sketch.buckets[index];
  int64_t replaced = 0;
  int64_t skipped = 0;
  int count = kWarp;
  for (int64_t chunk = begin; count == kWarp; chunk += kWarp) {
    const int64_t i = chunk + lane;
    const bool mine = i < seen.size && seen.buckets[i] == index;
    const int64_t key = mine ? seen.keys[i] : 0;
    const float score = mine ? seen.scores[i] : 0.0f;
    count = __popc(__ballot_sync(kWholeWarp, mine));
    for (int j = 0; j < count; ++j) {
      const Insertion outcome =
          insert(bucket, __shfl_sync(kWholeWarp, key, j), __shfl_sync(kWholeWarp, score, j));
      replaced += outcome == kReplaced;
      skipped += outcome == kSkipped;
    }
  }
  __syncwarp();  // shuffles do not order memory: all lanes have read the bucket before it is
                 // written
  if (lane != 0) return;
  sketch.buckets[index] = bucket;
  int64_t* counts = counters + index / sketch.num_buckets * kCounters;
  if (replaced > 0) add_to(counts + kReplacedKeys, replaced);
  if (skipped > 0) add_to(counts + kSkippedKeys, skipped);
}

// One warp for every 32 sorted occurrences: it takes the buckets that begin there.
__global__ void insert_kernel(HotSketch sketch, SortedOccurrences seen, int64_t* counters) {
  const int64_t warps = index_stride() / kWarp;
  const int64_t nowhere = sketch.num_shards * sketch.num_buckets;
  const int lane = threadIdx.x % kWarp;
  for (int64_t warp = first_index() / kWarp; warp * kWarp < seen.size; warp += warps) {
    const int64_t i = warp * kWarp + lane;
    const bool begins = i < seen.size && seen.buckets[i] < nowhere &&
                        (i == 0 || seen.buckets[i - 1] != seen.buckets[i]);
    unsigned left = __ballot_sync(kWholeWarp, begins);
    for (; left != 0; left &= left - 1) {
      insert_all(sketch, seen, warp * kWarp + __ffs(left) - 1, counters);
      __syncwarp();
    }
  }
}

// Sorts positions by bucket; equal buckets keep their order.
void sort_by_bucket(const Tensor& like, cudaStream_t stream, const Tensor& buckets,
                    const Tensor& positions, int64_t size, int bits) {
  auto* keys = static_cast<uint32_t*>(buckets.data_ptr());
  auto* values = static_cast<int32_t*>(positions.data_ptr());
  size_t bytes = 0;
  const auto run = [&](void* storage) {
    return cub::DeviceRadixSort::SortPairs(storage, bytes, keys, keys + size, values, values + size,
                                           static_cast<int>(size), 0, bits, stream);
  };
  STD_CUDA_CHECK(run(nullptr));
  const Tensor storage =
      torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  STD_CUDA_CHECK(run(storage.data_ptr()));
}

}  // namespace

void observe_checked_cuda(const Tensor& keys, const Tensor& shards, const Tensor& importance,
                          const Tensor& buckets, const Tensor& inflation, const Tensor& counters,
                          double growth) {
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const HotSketch sketch = hot_sketch(buckets);
  const int64_t size = keys.numel();
  const int64_t num_buckets = sketch.num_shards * sketch.num_buckets;
  STD_TORCH_CHECK(num_buckets < 0xffffffffLL, "`buckets` must be fewer than 2**32 - 1 on a GPU");
  if (sketch.num_shards == 0) return;
  const cudaStream_t stream = current_stream(keys);
  auto* counts = static_cast<int64_t*>(counters.data_ptr());
  auto* inflated = static_cast<double*>(inflation.data_ptr());
  const Tensor renormalise = torch::stable::new_empty(keys, {sketch.num_shards}, ScalarType::Int);
  auto* flags = static_cast<int32_t*>(renormalise.data_ptr());
  launch(stream, sketch.num_shards, inflate_kernel, sketch.num_shards, growth, inflated, counts,
         flags);
  if (growth > 1.0) {
    launch(stream, num_buckets, renormalise_kernel, sketch, flags);
  }
  if (size == 0) return;

  const Tensor where = torch::stable::new_empty(keys, {2, size}, ScalarType::Int);
  const Tensor positions = torch::stable::new_empty(keys, {2, size}, ScalarType::Int);
  const Tensor sorted_keys = torch::stable::new_empty(keys, {size});
  const Tensor sorted_scores = torch::stable::new_empty(keys, {size}, ScalarType::Float);
  auto* to = static_cast<uint32_t*>(where.data_ptr());
  auto* from = static_cast<int32_t*>(positions.data_ptr());
  launch(stream, size, route_kernel, sketch, keys.const_data_ptr<int64_t>(),
         shards.const_data_ptr<int32_t>(), importance.const_data_ptr<float>(), size, to, from,
         counts);
  sort_by_bucket(keys, stream, where, positions, size,
                 ceil_log2(static_cast<uint64_t>(num_buckets) + 1));
  launch(stream, size, gather_kernel, sketch, keys.const_data_ptr<int64_t>(),
         importance.const_data_ptr<float>(), inflated, to + size, from + size, size,
         static_cast<int64_t*>(sorted_keys.data_ptr()),
         static_cast<float*>(sorted_scores.data_ptr()));
  const SortedOccurrences seen{to + size, static_cast<int64_t*>(sorted_keys.data_ptr()),
                               static_cast<float*>(sorted_scores.data_ptr()), size};
  launch(stream, size, insert_kernel, sketch, seen, counts);
}

namespace {

void observe_cuda(const Tensor& keys, const Tensor& shards, const Tensor& importance,
                  const Tensor& buckets, const Tensor& inflation, const Tensor& counters,
                  double growth) {
  check_observe(keys, shards, importance, buckets, inflation, counters);
  observe_checked_cuda(keys, shards, importance, buckets, inflation, counters, growth);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("observe", TORCH_BOX(&observe_cuda));
}

}  // namespace torchrec_cafe
