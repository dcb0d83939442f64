#include <tuple>

#include "checks.h"
#include "launch.cuh"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

// One warp per shard: how many of the occurrences are the shard's.
__global__ void count_kernel(const int32_t* __restrict__ shards, int64_t size, int64_t num_shards,
                             int64_t* __restrict__ counts) {
  const int64_t shard = first_index() / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (shard >= num_shards) return;
  int64_t count = 0;
  for (int64_t i = lane; i < size; i += kWarp) count += shards[i] == shard;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    count += __shfl_down_sync(0xffffffffu, count, offset);
  }
  if (lane == 0) counts[shard] = count;
}

// One warp per shard: the shard's occurrences in batch order, so that the result does not depend on
// the schedule. Occurrences of a table that the statistics do not have are left out.
__global__ void order_kernel(const int32_t* __restrict__ shards, const int64_t* __restrict__ keys,
                             int64_t size, int64_t num_shards, int64_t num_tables,
                             const int64_t* __restrict__ counts, int64_t* __restrict__ begins,
                             int64_t* __restrict__ sizes, int32_t* __restrict__ order) {
  const int64_t shard = first_index() / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (shard >= num_shards) return;
  int64_t begin = 0;
  for (int64_t s = 0; s < shard; ++s) begin += counts[s];
  int64_t next = begin;
  for (int64_t start = 0; start < size; start += kWarp) {
    const int64_t i = start + lane;
    const bool mine = i < size && shards[i] == shard &&
                      (num_tables == 0 || (keys[i] >= 0 && table_of(keys[i]) < num_tables));
    const unsigned votes = __ballot_sync(0xffffffffu, mine);
    if (mine) order[next + __popc(votes & ((1u << lane) - 1))] = static_cast<int32_t>(i);
    next += __popc(votes);
  }
  if (lane == 0) {
    begins[shard] = begin;
    sizes[shard] = next - begin;
  }
}

__global__ void observe_kernel(SketchPointers sketch, StatisticsPointers stats, int64_t num_shards,
                               const int64_t* __restrict__ begins,
                               const int64_t* __restrict__ sizes, const int32_t* __restrict__ order,
                               const int64_t* __restrict__ keys,
                               const float* __restrict__ importance, double growth,
                               double norm_decay) {
  const int64_t shard = first_index();
  if (shard >= num_shards) return;
  const Occurrences seen{order + begins[shard], sizes[shard], keys, importance};
  observe(sketch.shard(shard), seen, stats.shard(shard), growth, norm_decay);
}

void observe_cuda(const Tensor& keys, const Tensor& shards, const Tensor& importance,
                  const Tensor& sketch_keys, const Tensor& sketch_scores,
                  const Tensor& sketch_hot_rows, const Tensor& norms, const Tensor& inflation,
                  const Tensor& counters, double growth, double norm_decay) {
  check_observe(keys, shards, importance, sketch_keys, sketch_scores, sketch_hot_rows, norms,
                inflation, counters);
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const int64_t num_shards = sketch_keys.size(0);
  const int64_t size = keys.numel();
  if (num_shards == 0) return;
  const cudaStream_t stream = current_stream(keys);
  Tensor ranges = torch::stable::new_empty(keys, {3, num_shards});
  int64_t* counts = ranges.mutable_data_ptr<int64_t>();
  int64_t* begins = counts + num_shards;
  int64_t* sizes = begins + num_shards;
  Tensor order = torch::stable::new_empty(keys, {size}, ScalarType::Int);
  const int warps = grid_size(num_shards * kWarp);
  count_kernel<<<warps, kThreads, 0, stream>>>(shards.const_data_ptr<int32_t>(), size, num_shards,
                                               counts);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  order_kernel<<<warps, kThreads, 0, stream>>>(
      shards.const_data_ptr<int32_t>(), keys.const_data_ptr<int64_t>(), size, num_shards,
      norms.size(1), counts, begins, sizes, order.mutable_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const SketchPointers sketch =
      sketch_pointers(sketch_keys, sketch_hot_rows, &sketch_scores, nullptr);
  const StatisticsPointers stats = statistics_pointers(norms, inflation, counters);
  observe_kernel<<<grid_size(num_shards * kWarp), kWarp, 0, stream>>>(
      sketch, stats, num_shards, begins, sizes, order.const_data_ptr<int32_t>(),
      keys.const_data_ptr<int64_t>(), importance.const_data_ptr<float>(), growth, norm_decay);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

__global__ void rebalance_kernel(SketchPointers sketch, const int64_t* __restrict__ selected,
                                 int64_t num_selected, int64_t num_shards,
                                 const double* __restrict__ inflation, int64_t* counters,
                                 double min_score, float hysteresis, int8_t* __restrict__ actions,
                                 int64_t* __restrict__ new_keys) {
  const int64_t i = first_index();
  if (i >= num_selected) return;
  const int64_t shard = selected[i];
  if (shard < 0 || shard >= num_shards || (i > 0 && shard <= selected[i - 1])) return;
  const RebalanceCounts done =
      rebalance(sketch.shard(shard), static_cast<float>(min_score * inflation[shard]), hysteresis,
                actions + i * sketch.num_hot_rows, new_keys + i * sketch.num_hot_rows);
  counters[shard * kCounters + kPromoted] += done.promoted;
  counters[shard * kCounters + kDemoted] += done.demoted;
}

std::tuple<Tensor, Tensor> rebalance_cuda(const Tensor& selected, const Tensor& sketch_keys,
                                          const Tensor& sketch_scores,
                                          const Tensor& sketch_hot_rows, const Tensor& owners,
                                          const Tensor& inflation, const Tensor& counters,
                                          double min_score, double hysteresis) {
  check_rebalance(selected, sketch_keys, sketch_scores, sketch_hot_rows, owners, inflation,
                  counters);
  const torch::stable::accelerator::DeviceGuard guard(selected.get_device_index());
  const int64_t num_selected = selected.numel();
  const SketchPointers sketch =
      sketch_pointers(sketch_keys, sketch_hot_rows, &sketch_scores, &owners);
  Tensor actions =
      torch::stable::new_zeros(selected, {num_selected, owners.size(1)}, ScalarType::Char);
  Tensor new_keys = torch::stable::new_zeros(selected, {num_selected, owners.size(1)});
  if (num_selected == 0) return {actions, new_keys};
  rebalance_kernel<<<grid_size(num_selected * kWarp), kWarp, 0, current_stream(selected)>>>(
      sketch, selected.const_data_ptr<int64_t>(), num_selected, sketch_keys.size(0),
      inflation.const_data_ptr<double>(), counters.mutable_data_ptr<int64_t>(), min_score,
      static_cast<float>(hysteresis), actions.mutable_data_ptr<int8_t>(),
      new_keys.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {actions, new_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CUDA, m) {
  m.impl("observe", TORCH_BOX(&observe_cuda));
  m.impl("rebalance", TORCH_BOX(&rebalance_cuda));
}

}  // namespace torchrec_cafe
