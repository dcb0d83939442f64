// The bits that the ids of a sample set together: all bits, sorted by sample, each once.
#include <bit>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>
#include <tuple>

#include "bloom.h"
#include "bloom_batch.cuh"
#include "checks.h"
#include "launch.cuh"
#include "scan.cuh"

namespace torchrec_cafe {
namespace {

// Key i * num_hashes + j is bit j of id i, after those of earlier samples; an id that sets fewer
// bits repeats its first.
__global__ void keys_kernel(Batch batch, BloomEncoder encoder, int64_t* __restrict__ keys) {
  const int64_t per_sample = encoder.shards_held * encoder.bits_per_shard;
  for (int64_t bag = first_index(); bag < batch.num_bags(); bag += index_stride()) {
    const Table table = Table::load(batch.tables, bag / batch.batch_size);
    const int64_t first = bag % batch.batch_size * per_sample;
    int64_t bits[kMaxHashes];
    for (int64_t i = batch.begin(bag); i < batch.end(bag); ++i) {
      const int size = encoder.encode(table, batch.ids[i], bits);
      for (int j = 0; j < encoder.num_hashes; ++j) {
        keys[i * encoder.num_hashes + j] = first + bits[j < size ? j : 0];
      }
    }
  }
}

__global__ void bits_kernel(const int64_t* __restrict__ keys, int64_t size, int64_t per_sample,
                            int64_t* __restrict__ bits) {
  for (int64_t i = first_index(); i < size; i += index_stride()) bits[i] = keys[i] % per_sample;
}

// offsets[b] = keys of the samples before b.
__global__ void offsets_kernel(const int64_t* __restrict__ keys, int64_t size, int64_t per_sample,
                               int64_t batch_size, int64_t* __restrict__ offsets) {
  for (int64_t b = first_index(); b <= batch_size; b += index_stride()) {
    int64_t begin = 0;
    int64_t end = size;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (keys[middle] < b * per_sample) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    offsets[b] = begin;
  }
}

// Calls run(storage, bytes) of CUB twice: to learn how much storage it needs, and to do it.
template <typename Run>
void with_storage(const Tensor& like, const Run& run) {
  size_t bytes = 0;
  STD_CUDA_CHECK(run(nullptr, bytes));
  const Tensor storage =
      torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  STD_CUDA_CHECK(run(storage.data_ptr(), bytes));
}

// Sorts the keys and drops those that repeat; returns how many are left, for which it waits.
int64_t sort_unique(Tensor& keys, int num_bits, cudaStream_t stream) {
  const int size = static_cast<int>(keys.numel());
  Tensor sorted = torch::stable::new_empty(keys, {size});
  const Tensor count = torch::stable::new_empty(keys, {1});
  auto* from = keys.mutable_data_ptr<int64_t>();
  auto* to = sorted.mutable_data_ptr<int64_t>();
  with_storage(keys, [&](void* storage, size_t& bytes) {
    return cub::DeviceRadixSort::SortKeys(storage, bytes, from, to, size, 0, num_bits, stream);
  });
  with_storage(keys, [&](void* storage, size_t& bytes) {
    return cub::DeviceSelect::Unique(storage, bytes, to, from,
                                     static_cast<int64_t*>(count.data_ptr()), size, stream);
  });
  return last_value(count, stream);
}

std::tuple<Tensor, Tensor> bloom_union_cuda(const Tensor& ids, const Tensor& offsets,
                                            const Tensor& tables, int64_t first_shard,
                                            int64_t shards_held, int64_t bits_per_shard,
                                            int64_t num_hashes, int64_t first_pair) {
  check_bloom_union(ids, offsets, tables, shards_held, bits_per_shard, num_hashes, first_pair);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const cudaStream_t stream = current_stream(ids);
  const Batch batch(ids, offsets, tables);
  Tensor out_offsets = torch::stable::new_zeros(offsets, {batch.batch_size + 1});
  if (ids.numel() == 0 || batch.num_bags() == 0)
    return {torch::stable::new_zeros(ids, {0}), out_offsets};
  const BloomEncoder encoder(first_shard, shards_held, bits_per_shard, num_hashes,
                             static_cast<int>(first_pair));
  const int64_t per_sample = shards_held * bits_per_shard;
  Tensor keys = torch::stable::new_zeros(ids, {ids.numel() * num_hashes});
  launch(stream, batch.num_bags(), keys_kernel, batch, encoder, keys.mutable_data_ptr<int64_t>());
  const int num_bits = std::bit_width(static_cast<uint64_t>(batch.batch_size * per_sample));
  const int64_t size = sort_unique(keys, num_bits, stream);
  Tensor bits = torch::stable::new_empty(ids, {size});
  launch(stream, size, bits_kernel, keys.const_data_ptr<int64_t>(), size, per_sample,
         bits.mutable_data_ptr<int64_t>());
  launch(stream, batch.batch_size + 1, offsets_kernel, keys.const_data_ptr<int64_t>(), size,
         per_sample, batch.batch_size, out_offsets.mutable_data_ptr<int64_t>());
  return {bits, out_offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("bloom_union", TORCH_BOX(&bloom_union_cuda));
}

}  // namespace torchrec_cafe
