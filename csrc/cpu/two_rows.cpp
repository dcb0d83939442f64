// Bags whose ids have up to two rows, which the TBE adds up.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/observe.h"
#include "cpu/tensors.h"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

using Rows = std::tuple<Tensor, Tensor, Tensor>;

// Bags that a thread takes at a time.
constexpr int64_t kBags = 4096;

struct TwoRowsOutput {
  Tensor rows;
  Tensor offsets;
  Tensor source;

  TwoRowsOutput(int64_t num_rows, int64_t num_bags)
      : rows(empty_cpu<1>({num_rows}, aoti_torch_dtype_int64())),
        offsets(empty_cpu<1>({num_bags + 1}, aoti_torch_dtype_int64())),
        source(empty_cpu<1>({num_rows}, aoti_torch_dtype_int32())) {
    offsets.mutable_data_ptr<int64_t>()[num_bags] = num_rows;
  }
};

void check_offsets(const int64_t* offsets, int64_t size, int64_t num_ids) {
  STD_TORCH_CHECK(
      kernels().offsets_ascend(offsets, size) && offsets[0] == 0 && offsets[size - 1] == num_ids,
      "`offsets` must ascend from 0 to the number of ids, ", num_ids);
}

Rows add_second_rows_cpu(const Tensor& rows, const Tensor& offsets, const Tensor& source,
                         const Tensor& keys, const Tensor& shards, const Tensor& buckets,
                         int64_t hot_rows_per_shard, int64_t rows_per_shard, int64_t hot_offset) {
  check_second_rows(rows, offsets, source, keys, shards, buckets, hot_rows_per_shard,
                    rows_per_shard);
  const int64_t num_ids = rows.numel();
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  check_offsets(starts, num_bags + 1, num_ids);
  check_shards(shards, 0, num_ids, buckets.size(0));
  const int32_t* from = source.const_data_ptr<int32_t>();
  int64_t wrong = 0;
  for (int64_t i = 0; i < num_ids; ++i) wrong |= (from[i] < 0) | (from[i] >= num_ids);
  STD_TORCH_CHECK(wrong == 0, "`source` must be in [0, ", num_ids, ")");
  const HotSketch sketch = hot_sketch(buckets);
  if (sketch.num_shards == 0 || sketch.num_buckets == 0) return {rows, offsets, source};
  const PoolRows pool{hot_offset, rows_per_shard, hot_rows_per_shard};
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int32_t* shard = shards.const_data_ptr<int32_t>();

  const int64_t num_blocks = (num_bags + kBags - 1) / kBags;
  std::vector<uint8_t> medium(num_ids);
  std::vector<int64_t> first(num_blocks + 1, 0);  // where each block's rows begin
  torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t begin_id = starts[block * kBags];
      const int64_t size = starts[std::min(num_bags, (block + 1) * kBags)] - begin_id;
      first[block + 1] = size + kernels().find_medium(sketch, from + begin_id, key, shard, size,
                                                      medium.data() + begin_id);
    }
  });
  std::partial_sum(first.begin(), first.end(), first.begin());
  TwoRowsOutput out(first[num_blocks], num_bags);
  int64_t* out_rows = out.rows.mutable_data_ptr<int64_t>();
  int64_t* out_offsets = out.offsets.mutable_data_ptr<int64_t>();
  int32_t* out_source = out.source.mutable_data_ptr<int32_t>();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    int64_t next = first[begin];
    for (int64_t bag = begin * kBags; bag < std::min(num_bags, end * kBags); ++bag) {
      out_offsets[bag] = next;
      for (int64_t i = starts[bag]; i < starts[bag + 1]; ++i) {
        out_rows[next] = row[i];
        out_source[next++] = from[i];
        if (medium[i] == 0) continue;
        out_rows[next] = pool.second(shard[from[i]], key[from[i]]);
        out_source[next++] = from[i];
      }
    }
  });
  return {out.rows, out.offsets, out.source};
}

Rows quotient_remainder_cpu(const Tensor& ids, const Tensor& offsets, const Tensor& tables) {
  check_quotient_remainder(ids, offsets, tables);
  const int64_t num_ids = ids.numel();
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t num_features = tables.size(0);
  const int64_t batch_size = num_bags / num_features;
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  check_offsets(starts, num_bags + 1, num_ids);
  TwoRowsOutput out(2 * num_ids, num_bags);
  int64_t* out_rows = out.rows.mutable_data_ptr<int64_t>();
  int64_t* out_offsets = out.offsets.mutable_data_ptr<int64_t>();
  int32_t* out_source = out.source.mutable_data_ptr<int32_t>();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<QuotientRemainder> maps;
  for (int64_t f = 0; f < num_features; ++f) {
    maps.push_back(QuotientRemainder::load(tables.const_data_ptr<int64_t>(), f));
  }
  const int64_t samples = std::max<int64_t>(1, kBags / num_features);
  torch::stable::parallel_for(0, batch_size, samples, [&](int64_t begin, int64_t end) {
    int64_t next = 0;
    for (int64_t f = 0; f < num_features; ++f) {
      next += 2 * (starts[f * batch_size + begin] - starts[f * batch_size]);
    }
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t f = 0; f < num_features; ++f) {
        out_offsets[b * num_features + f] = next;
        for (int64_t i = starts[f * batch_size + b]; i < starts[f * batch_size + b + 1]; ++i) {
          const QuotientRemainder::Rows pair = maps[f].rows(id[i]);
          out_rows[next] = pair.remainder;
          out_rows[next + 1] = pair.quotient;
          out_source[next] = out_source[next + 1] = static_cast<int32_t>(i);
          next += 2;
        }
      }
    }
  });
  return {out.rows, out.offsets, out.source};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("add_second_rows", TORCH_BOX(&add_second_rows_cpu));
  m.impl("quotient_remainder", TORCH_BOX(&quotient_remainder_cpu));
}

}  // namespace torchrec_cafe
