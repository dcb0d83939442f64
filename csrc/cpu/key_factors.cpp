// Learned factors of ids that a pool tracks: weights by key and shard, and what they learn from.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/offsets.h"
#include "cpu/tensors.h"
#include "cpu/weight_sums.h"
#include "factor_lines.h"

namespace torchrec_cafe {
namespace {

// Below these many a thread, starting the threads costs more than they save.
constexpr int64_t kKeysPerThread = 2048;
constexpr int64_t kBagsPerBlock = 1024;

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
  const LineEncoder encoder(weights.size(0), weights.size(1), static_cast<int>(num_hashes));
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

void refuse(const RowDots& in, int64_t lookup) {
  STD_TORCH_CHECK(in.rows[lookup] >= 0 && in.rows[lookup] < in.num_rows, "`rows` must be in [0, ",
                  in.num_rows, "), got ", in.rows[lookup]);
  STD_TORCH_CHECK(false, "`source` must be in [0, ", in.num_ids, "), got ", in.source[lookup]);
}

Tensor row_dots_cpu(const Tensor& grad, const Tensor& table, const Tensor& rows,
                    const Tensor& offsets, const Tensor& source, const Tensor& shards,
                    const Tensor& features) {
  check_row_dots(grad, table, rows, offsets, source, shards, features);
  std::vector<int64_t> tracked;
  for (int64_t f = 0; f < features.numel(); ++f) {
    if (features.const_data_ptr<int64_t>()[f] >= 0) tracked.push_back(f);
  }
  const RowDots in{grad.const_data_ptr<float>(),
                   table.data_ptr(),
                   table.scalar_type() == ScalarType::Half,
                   table.size(1),
                   rows.const_data_ptr<int64_t>(),
                   offsets.const_data_ptr<int64_t>(),
                   source.const_data_ptr<int32_t>(),
                   shards.const_data_ptr<int32_t>(),
                   tracked.data(),
                   static_cast<int64_t>(tracked.size()),
                   features.numel(),
                   table.size(0),
                   shards.numel()};
  check_offsets(in.offsets, offsets.numel(), rows.numel());
  if (in.num_ids == 0 && rows.numel() > 0) refuse(in, 0);
  Tensor dots = empty_cpu<1>({in.num_ids}, aoti_torch_dtype_float32());
  float* out = dots.mutable_data_ptr<float>();
  std::fill_n(out, in.num_ids, 0.0f);
  const int64_t samples = grad.size(0) / in.num_features;
  const int64_t per_block = std::max<int64_t>(1, kBagsPerBlock / (1 + in.num_wanted));
  std::vector<int64_t> wrong(num_blocks(samples, per_block), -1);
  each_block(samples, per_block, [&](int64_t block, int64_t begin, int64_t end) {
    wrong[block] = kernels().row_dots(in, begin, end, out);
  });
  for (const int64_t lookup : wrong) {
    if (lookup >= 0) refuse(in, lookup);
  }
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
  const LineEncoder encoder(shards_held, weights_per_shard, static_cast<int>(num_hashes));
  const int64_t size = shards_held == 0 ? 0 : keys.numel();
  WeightSums<kLineWeights> sums(encoder.num_lines(), kernels().count_shards(shard, size));
  LineBlock block;
  for (int64_t next = 0; next < size;) {
    next = kernels().encode_keys(encoder, key, shard, next, size, block);
    kernels().add_to_lines(block, of_key, sums.places(), sums.sums());
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
