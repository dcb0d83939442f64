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

Tensor row_dots_cpu(const Tensor& grad, const Tensor& table, const Tensor& rows,
                    const Tensor& offsets, const Tensor& source, int64_t num_ids) {
  check_row_dots(grad, table, rows, offsets, source, num_ids);
  const RowDots in{grad.const_data_ptr<float>(),
                   table.data_ptr(),
                   table.scalar_type() == ScalarType::Half,
                   table.size(1),
                   rows.const_data_ptr<int64_t>(),
                   offsets.const_data_ptr<int64_t>(),
                   source.const_data_ptr<int32_t>(),
                   rows.numel()};
  check_offsets(in.offsets, offsets.numel(), in.size);
  for (int64_t m = 0; m < in.size; ++m) {
    STD_TORCH_CHECK(in.rows[m] >= 0 && in.rows[m] < table.size(0), "`rows` must be in [0, ",
                    table.size(0), "), got ", in.rows[m]);
    STD_TORCH_CHECK(in.source[m] >= 0 && in.source[m] < num_ids, "`source` must be in [0, ",
                    num_ids, "), got ", in.source[m]);
  }
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
  WeightSums sums(keys.numel() == 0 ? 0 : shards_held * weights_per_shard);
  BloomBits bits;
  for (int64_t from = 0; from < keys.numel() && shards_held > 0; from += kBloomBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBloomBlock, keys.numel() - from));
    kernels().encode_keys(encoder, key + from, shard + from, size, bits);
    for (int i = 0; i < size; ++i) {
      if (shard[from + i] >= 0) sums.add(bits, i, encoder.num_hashes, of_key[from + i]);
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
