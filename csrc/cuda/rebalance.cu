#include <tuple>

#include "checks.h"
#include "launch.cuh"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

constexpr int kWarps = kThreads / kWarp;

// What the threads of a block share while they rebalance a shard.
struct Scratch {
  int32_t histogram[RadixSelect::kDigits];
  int32_t by_warp[kWarps];
  unsigned long long total;
};

// Sum over the block, known to every thread.
__device__ int64_t block_sum(int64_t amount, Scratch& scratch) {
  __syncthreads();
  if (threadIdx.x == 0) scratch.total = 0;
  __syncthreads();
  if (amount != 0) atomicAdd(&scratch.total, static_cast<unsigned long long>(amount));
  __syncthreads();
  return static_cast<int64_t>(scratch.total);
}

// How many threads before this one have the flag set; `*all` is how many of the block have.
__device__ int block_rank(bool flag, Scratch& scratch, int* all) {
  const unsigned votes = __ballot_sync(0xffffffffu, flag);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  __syncthreads();
  if (lane == 0) scratch.by_warp[warp] = __popc(votes);
  __syncthreads();
  int rank = __popc(votes & ((1u << lane) - 1));
  *all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) rank += scratch.by_warp[w];
    *all += scratch.by_warp[w];
  }
  return rank;
}

__device__ int64_t block_count(const Shard& shard, const Candidates& which, Scratch& scratch) {
  int64_t size = 0;
  for (int64_t slot = threadIdx.x; slot < shard.num_buckets * kSlots; slot += kThreads) {
    size += which.contain(shard.hot_row(slot), shard.score(slot));
  }
  return block_sum(size, scratch);
}

__device__ float block_nth_largest(const Shard& shard, int64_t n, const Candidates& which,
                                   Scratch& scratch) {
  RadixSelect select(n);  // every thread has its own, and all are the same
  for (int round = 0; round < RadixSelect::kRounds; ++round) {
    __syncthreads();
    for (int digit = threadIdx.x; digit < RadixSelect::kDigits; digit += kThreads) {
      scratch.histogram[digit] = 0;
    }
    __syncthreads();
    for (int64_t slot = threadIdx.x; slot < shard.num_buckets * kSlots; slot += kThreads) {
      const float score = shard.score(slot);
      if (which.contain(shard.hot_row(slot), score) && select.matches(score)) {
        atomicAdd(&scratch.histogram[RadixSelect::digit(score, round)], 1);
      }
    }
    __syncthreads();
    select.settle(scratch.histogram, round);
  }
  return select.score();
}

// Takes rows back, and lists the free ones in ascending order. Returns how many are free.
__device__ int64_t demote_rows(const Shard& shard, float keep, int8_t* actions, int64_t* new_keys,
                               int32_t* free_rows, int64_t* demoted, Scratch& scratch) {
  int64_t num_free = 0;
  int64_t mine = 0;
  for (int64_t first = 0; first < shard.num_hot_rows; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    bool is_free = false;
    if (row < shard.num_hot_rows) {
      actions[row] = shard.demote(row, keep);
      new_keys[row] = 0;
      mine += actions[row] == kClearRow;
      is_free = shard.owners[row] == kNoOwner;
    }
    int all = 0;
    const int rank = block_rank(is_free, scratch, &all);
    if (is_free) free_rows[num_free + rank] = static_cast<int32_t>(row);
    num_free += all;
  }
  *demoted = block_sum(mine, scratch);
  return num_free;
}

// Gives the free rows, in ascending order, to the slots above `cut` and the first `at_cut` at it.
__device__ int64_t promote_slots(const Shard& shard, float cut, int64_t at_cut, int64_t num_free,
                                 const int32_t* free_rows, int8_t* actions, int64_t* new_keys,
                                 Scratch& scratch) {
  int64_t seen_at_cut = 0;
  int64_t promoted = 0;
  const int64_t num_slots = shard.num_buckets * kSlots;
  for (int64_t first = 0; first < num_slots; first += kThreads) {
    const int64_t slot = first + threadIdx.x;
    const bool wants_row = slot < num_slots && shard.wants_row(slot);
    const bool above = wants_row && shard.score(slot) > cut;
    const bool at = wants_row && shard.score(slot) == cut;
    int all = 0;
    const bool taken = block_rank(at, scratch, &all) + seen_at_cut < at_cut && at;
    seen_at_cut += all;
    const int64_t place = promoted + block_rank(above || taken, scratch, &all);
    if ((above || taken) && place < num_free) {
      const int32_t row = free_rows[place];
      actions[row] = shard.promote(slot, row);
      new_keys[row] = shard.key(slot);
    }
    promoted += all;
  }
  return promoted;
}

__device__ void set_medium(const Shard& shard, int64_t num_medium, float hysteresis,
                           Scratch& scratch) {
  const Candidates all{Candidates::kMaxRow, 0.0f};
  const int64_t rank = shard.num_hot_rows + num_medium;
  float at_least = 0.0f;
  if (block_count(shard, all, scratch) > rank) {
    at_least = block_nth_largest(shard, rank, all, scratch);
  }
  const float keep = at_least * (1.0f - hysteresis);
  __syncthreads();
  for (int64_t slot = threadIdx.x; slot < shard.num_buckets * kSlots; slot += kThreads) {
    shard.set_medium(slot, at_least, keep);
  }
}

// One block per selected shard; the same steps as cpu/kernels.cpp.
__global__ void rebalance_kernel(RebalanceState state, const int64_t* __restrict__ selected,
                                 double min_score, float hysteresis, int64_t num_medium,
                                 int32_t* free_rows, int8_t* actions, int64_t* new_keys) {
  __shared__ Scratch scratch;
  const int64_t i = blockIdx.x;
  const int64_t s = selected[i];
  if (s < 0 || s >= state.sketch.num_shards) return;
  // Out of order, it may be the shard of another block, too.
  bool in_order = true;
  for (int64_t j = threadIdx.x; j < i; j += kThreads) in_order &= selected[j] < s;
  if (!__syncthreads_and(in_order)) return;
  const Shard shard = state.shard(s);
  free_rows += i * state.num_hot_rows;
  actions += i * state.num_hot_rows;
  new_keys += i * state.num_hot_rows;

  const Candidates all{Candidates::kMaxRow, 0.0f};
  float nth = 0.0f;
  if (block_count(shard, all, scratch) > shard.num_hot_rows) {
    nth = block_nth_largest(shard, shard.num_hot_rows, all, scratch);
  }
  const Threshold threshold(nth, static_cast<float>(min_score * state.inflation[s]), hysteresis);
  int64_t demoted = 0;
  const int64_t num_free =
      demote_rows(shard, threshold.keep, actions, new_keys, free_rows, &demoted, scratch);
  const Candidates eligible{kCold, threshold.promote};
  const int64_t num_eligible = num_free == 0 ? 0 : block_count(shard, eligible, scratch);
  float cut = threshold.promote;
  int64_t at_cut = num_eligible;
  if (num_eligible > num_free) {
    cut = block_nth_largest(shard, num_free, eligible, scratch);
    const Candidates above{kCold, float_from_bits(float_bits(cut) + 1)};
    at_cut = num_free - block_count(shard, above, scratch);
  }
  int64_t promoted = 0;
  if (num_eligible > 0) {
    promoted = promote_slots(shard, cut, at_cut, num_free, free_rows, actions, new_keys, scratch);
  }
  if (num_medium > 0) set_medium(shard, num_medium, hysteresis, scratch);
  if (threadIdx.x == 0) {
    state.counters[s * kCounters + kPromoted] += promoted;
    state.counters[s * kCounters + kDemoted] += demoted;
  }
}

std::tuple<Tensor, Tensor> rebalance_cuda(const Tensor& selected, const Tensor& buckets,
                                          const Tensor& owners, const Tensor& inflation,
                                          const Tensor& counters, double min_score,
                                          double hysteresis, int64_t num_medium) {
  check_rebalance(selected, buckets, owners, inflation, counters);
  const torch::stable::accelerator::DeviceGuard guard(selected.get_device_index());
  const RebalanceState state = rebalance_state(buckets, owners, inflation, counters);
  const int64_t num_selected = selected.numel();
  Tensor actions =
      torch::stable::new_zeros(selected, {num_selected, state.num_hot_rows}, ScalarType::Char);
  Tensor new_keys = torch::stable::new_zeros(selected, {num_selected, state.num_hot_rows});
  if (num_selected == 0) return {actions, new_keys};
  const Tensor free_rows =
      torch::stable::new_empty(selected, {num_selected, state.num_hot_rows}, ScalarType::Int);
  launch_blocks(current_stream(selected), num_selected, rebalance_kernel, state,
                selected.const_data_ptr<int64_t>(), min_score, static_cast<float>(hysteresis),
                num_medium, static_cast<int32_t*>(free_rows.data_ptr()),
                actions.mutable_data_ptr<int8_t>(), new_keys.mutable_data_ptr<int64_t>());
  return {actions, new_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("rebalance", TORCH_BOX(&rebalance_cuda));
}

}  // namespace torchrec_cafe
