// Bloom encodings of ids: their token rows, and their weights.
#include "bloom.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/bloom_batch.h"
#include "cpu/tensors.h"
#include "cpu/weight_sums.h"

namespace torchrec_cafe {
namespace {

using Rows = std::tuple<Tensor, Tensor, Tensor>;

// Number of rows of the ids of samples [begin, end).
int64_t count_rows(const Batch& batch, const BloomEncoder& encoder, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t f = 0; f < batch.num_features; ++f) {
    const int64_t* bags = batch.offsets + f * batch.batch_size;
    if (encoder.num_hashes == 1) {
      count += bags[end] - bags[begin];
      continue;
    }
    each_encoded(batch, encoder, batch.tables[f], bags[begin], bags[end],
                 [&](int64_t, const BloomBits& bits, int i) {
                   for (int h = 0; h < encoder.num_hashes; ++h) count += bits.at[h][i] >= 0;
                 });
  }
  return count;
}

// Where the rows of bags are written, sample-major.
struct RowsOutput {
  int64_t* rows;
  int64_t* offsets;
  int32_t* source;
};

void write_rows(const Batch& batch, const BloomEncoder& encoder, int64_t begin, int64_t end,
                int64_t next, const RowsOutput& out) {
  const int hashes = encoder.num_hashes;
  const EncodedSamples found(batch, encoder, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t f = 0; f < batch.num_features; ++f) {
      const int64_t* bag = batch.offsets + f * batch.batch_size + b;
      const int32_t* from = found.of(f);
      out.offsets[b * batch.num_features + f] = next;
      for (int64_t i = bag[0]; i < bag[1]; ++i) {
        for (int h = 0; h < hashes; ++h) {
          const int32_t row = from[i * hashes + h];
          if (row < 0) continue;
          out.rows[next] = row;
          out.source[next++] = static_cast<int32_t>(i);
        }
      }
    }
  }
}

Rows bloom_rows_cpu(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                    int64_t first_shard, int64_t shards_held, int64_t rows_per_shard,
                    int64_t num_hashes) {
  check_bloom(ids, offsets, tables, shards_held, rows_per_shard, num_hashes);
  const Batch batch(ids, offsets, tables);
  const BloomEncoder encoder(first_shard, shards_held, rows_per_shard, num_hashes, kTokenPairs);
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t samples = samples_per_block(batch, ids.numel());
  // Where each block's rows begin.
  std::vector<int64_t> first(num_blocks(batch.batch_size, samples) + 1, 0);
  each_block(batch.batch_size, samples, [&](int64_t block, int64_t begin, int64_t end) {
    first[block + 1] = count_rows(batch, encoder, begin, end);
  });
  std::partial_sum(first.begin(), first.end(), first.begin());
  Tensor rows = empty_cpu<1>({first.back()}, aoti_torch_dtype_int64());
  Tensor out_offsets = empty_cpu<1>({num_bags + 1}, aoti_torch_dtype_int64());
  Tensor source = empty_cpu<1>({first.back()}, aoti_torch_dtype_int32());
  const RowsOutput out{rows.mutable_data_ptr<int64_t>(), out_offsets.mutable_data_ptr<int64_t>(),
                       source.mutable_data_ptr<int32_t>()};
  out.offsets[num_bags] = first.back();
  each_block(batch.batch_size, samples, [&](int64_t block, int64_t begin, int64_t end) {
    write_rows(batch, encoder, begin, end, first[block], out);
  });
  return {rows, out_offsets, source};
}

Tensor bloom_weigh_cpu(const Tensor& weights, const Tensor& ids, const Tensor& offsets,
                       const Tensor& tables, int64_t first_shard, int64_t num_hashes) {
  check_bloom_weights(weights, ids, offsets, tables, num_hashes);
  const Batch batch(ids, offsets, tables);
  const BloomEncoder encoder(first_shard, weights.size(0), weights.size(1), num_hashes,
                             kWeightPairs);
  Tensor factors = empty_cpu<1>({ids.numel()}, aoti_torch_dtype_float32());
  const float* weight = weights.const_data_ptr<float>();
  float* out = factors.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, ids.numel(), kIdsPerThread, [&](int64_t begin, int64_t end) {
    batch.each_feature(begin, end, [&](const Table& table, int64_t first, int64_t last) {
      kernels().bloom_factors(encoder, table, batch.ids + first, last - first, weight, out + first);
    });
  });
  return factors;
}

// What the kernels are told of a batch and of the two tables.
BloomLookup lookup_of(const Batch& batch, const Tensor& rows, const Tensor& per_sample_weights,
                      const BloomEncoder& token_rows, const BloomEncoder& token_weights) {
  return {batch.ids,
          batch.offsets,
          batch.tables.data(),
          batch.num_features,
          batch.batch_size,
          token_rows,
          token_weights,
          rows.data_ptr(),
          rows.scalar_type() == ScalarType::Half,
          rows.size(1),
          nullptr,
          per_sample_weights.numel() > 0 ? per_sample_weights.const_data_ptr<float>() : nullptr,
          nullptr,
          nullptr};
}

// Calls run(feature, first sample, end) for the bags that each thread takes.
template <typename Run>
void each_bag_range(const Batch& batch, int64_t num_ids, const Run& run) {
  const int64_t num_bags = batch.num_features * batch.batch_size;
  const int64_t bags_per_thread = 1 + kIdsPerThread * num_bags / (1 + num_ids);
  torch::stable::parallel_for(0, num_bags, bags_per_thread, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t feature = begin / batch.batch_size;
      const int64_t last = std::min(end, (feature + 1) * batch.batch_size);
      run(feature, begin - feature * batch.batch_size, last - feature * batch.batch_size);
      begin = last;
    }
  });
}

Tensor bloom_pool_cpu(const Tensor& rows, const Tensor& weights, const Tensor& ids,
                      const Tensor& offsets, const Tensor& tables, const Tensor& per_sample_weights,
                      int64_t first_shard, int64_t num_hashes, int64_t num_weight_hashes) {
  check_bloom_weights(weights, ids, offsets, tables, num_weight_hashes);
  check_token_rows(rows, ids, offsets, tables, per_sample_weights, weights.size(0), num_hashes);
  const Batch batch(ids, offsets, tables);
  const int64_t held = weights.size(0);
  BloomLookup in = lookup_of(
      batch, rows, per_sample_weights,
      BloomEncoder(first_shard, held, rows_per_shard(rows, held), num_hashes, kTokenPairs),
      BloomEncoder(first_shard, held, weights.size(1), num_weight_hashes, kWeightPairs));
  Tensor pooled =
      empty_cpu<2>({batch.batch_size, batch.num_features * in.dim}, aoti_torch_dtype_float32());
  in.weights = weights.const_data_ptr<float>();
  in.pooled = pooled.mutable_data_ptr<float>();
  each_bag_range(batch, ids.numel(), [&](int64_t feature, int64_t first, int64_t last) {
    kernels().bloom_pool(in, feature, first, last);
  });
  return pooled;
}

// The sums are one thread's: they have the same bits for any number of them.
std::tuple<Tensor, Tensor> bloom_weigh_backward_cpu(
    const Tensor& grad, const Tensor& rows, const Tensor& ids, const Tensor& offsets,
    const Tensor& tables, const Tensor& per_sample_weights, int64_t first_shard,
    int64_t shards_held, int64_t weights_per_shard, int64_t num_hashes, int64_t num_weight_hashes) {
  check_bloom_backward(grad, rows, ids, offsets, tables, per_sample_weights, shards_held,
                       weights_per_shard, num_hashes, num_weight_hashes);
  const Batch batch(ids, offsets, tables);
  const BloomEncoder encoder(first_shard, shards_held, weights_per_shard, num_weight_hashes,
                             kWeightPairs);
  BloomLookup in =
      lookup_of(batch, rows, per_sample_weights,
                BloomEncoder(first_shard, shards_held, rows_per_shard(rows, shards_held),
                             num_hashes, kTokenPairs),
                encoder);
  in.grad = grad.const_data_ptr<float>();
  const std::unique_ptr<float[]> dots(new float[ids.numel()]);
  each_bag_range(batch, ids.numel(), [&](int64_t feature, int64_t first, int64_t last) {
    kernels().bloom_dots(in, feature, first, last, dots.get());
  });
  WeightSums<kWeightsPerRow> sums(shards_held * weights_per_shard / kWeightsPerRow,
                                  num_weight_hashes * ids.numel());
  batch.each_feature(0, ids.numel(), [&](const Table& table, int64_t first, int64_t last) {
    each_encoded(batch, encoder, table, first, last, [&](int64_t id, const BloomBits& bits, int i) {
      for (int h = 0; h < encoder.num_hashes; ++h) {
        const int32_t bit = bits.at[h][i];
        if (bit >= 0) sums.add(bit / kWeightsPerRow, bit % kWeightsPerRow, dots[id]);
      }
    });
  });
  return sums.by_row();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("bloom_pool", TORCH_BOX(&bloom_pool_cpu));
  m.impl("bloom_rows", TORCH_BOX(&bloom_rows_cpu));
  m.impl("bloom_weigh", TORCH_BOX(&bloom_weigh_cpu));
  m.impl("bloom_weigh_backward", TORCH_BOX(&bloom_weigh_backward_cpu));
}

}  // namespace torchrec_cafe
