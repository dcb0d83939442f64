// Learned factors of ids that a pool tracks: weights by key and shard, and what they learn from.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "bloom.h"
#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/offsets.h"
#include "cpu/tensors.h"
#include "cpu/weight_sums.h"

namespace torchrec_cafe {
namespace {

// Below these many a thread, starting the threads costs more than they save.
constexpr int64_t kKeysPerThread = 2048;
constexpr int64_t kBagsPerBlock = 1024;

BloomEncoder encoder_of(int64_t shards_held, int64_t weights_per_shard, int64_t num_hashes) {
  return {0, shards_held, weights_per_shard, static_cast<int>(num_hashes), kWeightPairs};
}

void check_shards(const int32_t* shards, int64_t size, int64_t shards_held) {
  STD_TORCH_CHECK(kernels().shards_fit(shards, size, shards_held), "`shards` must be -1 or in [0, ",
                  shards_held, ")");
}

Tensor key_factors_cpu(const Tensor& weights, const Tensor& keys, const Tensor& shards,
                       int64_t num_hashes) {
  check_tensor(weights, "weights", ScalarType::Float, 2);
  check_keys(keys, shards, weights.size(0), weights.size(1), num_hashes);
  check_device(weights, keys);
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int32_t* shard = shards.const_data_ptr<int32_t>();
  check_shards(shard, shards.numel(), weights.size(0));
  const BloomEncoder encoder = encoder_of(weights.size(0), weights.size(1), num_hashes);
  Tensor factors = empty_cpu<1>({keys.numel()}, aoti_torch_dtype_float32());
  float* out = factors.mutable_data_ptr<float>();
  if (weights.numel() == 0) {  // no shard, so that no key has weights
    std::fill_n(out, keys.numel(), 1.0f);
    return factors;
  }
  const float* weight = weights.const_data_ptr<float>();
  torch::stable::parallel_for(0, keys.numel(), kKeysPerThread, [&](int64_t begin, int64_t end) {
    kernels().key_factors(encoder, key + begin, shard + begin, end - begin, weight, out + begin);
  });
  return factors;
}

void check_lookups(const RowDots& in, int64_t num_rows, int64_t num_ids) {
  if (kernels().lookups_fit(in.rows, in.source, in.size, num_rows, num_ids)) return;
  for (int64_t m = 0; m < in.size; ++m) {
    STD_TORCH_CHECK(in.rows[m] >= 0 && in.rows[m] < num_rows, "`rows` must be in [0, ", num_rows,
                    "), got ", in.rows[m]);
    STD_TORCH_CHECK(in.source[m] >= 0 && in.source[m] < num_ids, "`source` must be in [0, ",
                    num_ids, "), got ", in.source[m]);
  }
}

Tensor row_dots_cpu(const Tensor& grad, const Tensor& table, const Tensor& rows,
                    const Tensor& offsets, const Tensor& source, const Tensor& shards) {
  check_row_dots(grad, table, rows, offsets, source, shards);
  const RowDots in{grad.const_data_ptr<float>(),
                   table.data_ptr(),
                   table.scalar_type() == ScalarType::Half,
                   table.size(1),
                   rows.const_data_ptr<int64_t>(),
                   offsets.const_data_ptr<int64_t>(),
                   source.const_data_ptr<int32_t>(),
                   shards.const_data_ptr<int32_t>(),
                   rows.numel()};
  const int64_t num_ids = shards.numel();
  check_offsets(in.offsets, offsets.numel(), in.size);
  check_lookups(in, table.size(0), num_ids);
  Tensor dots = empty_cpu<1>({num_ids}, aoti_torch_dtype_float32());
  float* out = dots.mutable_data_ptr<float>();
  std::fill_n(out, num_ids, 0.0f);
  each_block(offsets.numel() - 1, kBagsPerBlock,
             [&](int64_t, int64_t begin, int64_t end) { kernels().row_dots(in, begin, end, out); });
  return dots;
}

// The sums are one thread's: they have the same bits for any number of them.
std::tuple<Tensor, Tensor> key_factors_backward_cpu(const Tensor& grad, const Tensor& keys,
                                                    const Tensor& shards, int64_t shards_held,
                                                    int64_t weights_per_shard, int64_t num_hashes) {
  check_tensor(grad, "grad", ScalarType::Float, 1);
  check_keys(keys, shards, shards_held, weights_per_shard, num_hashes);
  check_device(grad, keys);
  STD_TORCH_CHECK(grad.numel() == keys.numel(), "`grad` must have as many elements as `keys`, ",
                  keys.numel(), ", got ", grad.numel());
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int32_t* shard = shards.const_data_ptr<int32_t>();
  const float* of_key = grad.const_data_ptr<float>();
  check_shards(shard, shards.numel(), shards_held);
  const BloomEncoder encoder = encoder_of(shards_held, weights_per_shard, num_hashes);
  const int64_t size = shards_held == 0 ? 0 : keys.numel();
  WeightSums sums(shards_held * weights_per_shard,
                  num_hashes * kernels().count_shards(shard, size));
  KeyBlock blocks[2];
  int64_t next = kernels().encode_keys(encoder, key, shard, 0, size, blocks[0]);
  for (int current = 0; blocks[current].size > 0; current ^= 1) {
    const KeyBlock& block = blocks[current];
    KeyBlock& ahead = blocks[current ^ 1];
    next = kernels().encode_keys(encoder, key, shard, next, size, ahead);
    sums.ask_for(ahead.bits, ahead.size, encoder.num_hashes);
    for (int i = 0; i < block.size; ++i) {
      sums.add(block.bits, i, encoder.num_hashes, of_key[block.at[i]]);
    }
  }
  return sums.by_row();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("key_factors", TORCH_BOX(&key_factors_cpu));
  m.impl("key_factors_backward", TORCH_BOX(&key_factors_backward_cpu));
  m.impl("row_dots", TORCH_BOX(&row_dots_cpu));
}

}  // namespace torchrec_cafe
