#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/offsets.h"
#include "cpu/tensors.h"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

using Remapped = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Below this many bags per thread, starting the threads costs more than they save.
constexpr int64_t kBagsPerThread = 2048;

Remapped remap_cpu(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                   const Tensor& buckets, int64_t first_shard, int64_t num_shards,
                   int64_t hot_rows_per_shard, int64_t rows_per_shard, int64_t hot_offset,
                   bool with_source) {
  const PoolRows pool{hot_offset, rows_per_shard, hot_rows_per_shard};
  check_remap(ids, offsets, tables, buckets, num_shards, pool);
  check_table_values(tables);
  const RowMap map = row_map(tables, offsets, buckets, first_shard, num_shards, pool);
  const int64_t num_ids = ids.numel();
  const RemapInput in{ids.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>()};
  check_offsets(in.offsets, offsets.numel(), num_ids);

  const int32_t int32 = aoti_torch_dtype_int32();
  const int32_t int64 = aoti_torch_dtype_int64();
  const bool may_be_hot = num_shards > 0;
  const bool may_be_medium = may_be_hot && map.has_second_rows();
  Tensor rows = empty_cpu<1>({num_ids}, int64);
  Tensor out_offsets = empty_cpu<1>({offsets.numel()}, int64);
  Tensor source = empty_cpu<1>({with_source ? num_ids : 0}, int32);
  Tensor keys = empty_cpu<1>({may_be_hot ? num_ids : 0}, int64);
  Tensor shards = empty_cpu<1>({may_be_hot ? num_ids : 0}, int32);
  Tensor second = empty_cpu<1>({may_be_medium ? num_ids : 0}, int32);
  const bool with_cold = with_source && may_be_hot;
  Tensor cold_shards = empty_cpu<1>({with_cold ? num_ids : 0}, int32);
  const RemapOutput out{rows.mutable_data_ptr<int64_t>(),
                        out_offsets.mutable_data_ptr<int64_t>(),
                        with_source ? source.mutable_data_ptr<int32_t>() : nullptr,
                        may_be_hot ? keys.mutable_data_ptr<int64_t>() : nullptr,
                        may_be_hot ? shards.mutable_data_ptr<int32_t>() : nullptr,
                        may_be_medium ? second.mutable_data_ptr<int32_t>() : nullptr,
                        with_cold ? cold_shards.mutable_data_ptr<int32_t>() : nullptr};
  out.offsets[offsets.numel() - 1] = num_ids;
  const int64_t samples_per_thread = std::max<int64_t>(1, kBagsPerThread / map.num_features);
  torch::stable::parallel_for(0, map.batch_size, samples_per_thread,
                              [&](int64_t begin, int64_t end) {
                                kernels().remap(map, hot_sketch(buckets), in, out, begin, end);
                              });
  return {rows, out_offsets, source, keys, shards, second, cold_shards};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("remap", TORCH_BOX(&remap_cpu)); }

}  // namespace torchrec_cafe
