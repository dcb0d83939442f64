// Learned factors of ids that a pool tracks: weights by key and shard, and what they learn from.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/line_sums.h"
#include "cpu/offsets.h"
#include "cpu/tensors.h"
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
                       int64_t num_hashes, std::optional<Tensor> source) {
  check_key_factors(weights, keys, shards, num_hashes, source);
  const int64_t num_keys = keys.numel();
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int32_t* shard = shards.const_data_ptr<int32_t>();
  check_shards(shard, num_keys, weights.size(0));
  const LineEncoder encoder(weights.size(0), weights.size(1), static_cast<int>(num_hashes));
  Tensor of_keys = empty_cpu<1>({num_keys}, aoti_torch_dtype_float32());
  float* all = of_keys.mutable_data_ptr<float>();
  const float* weight = weights.const_data_ptr<float>();
  torch::stable::parallel_for(0, num_keys, kKeysPerThread, [&](int64_t begin, int64_t end) {
    kernels().key_factors(encoder, key + begin, shard + begin, end - begin, weight, all + begin);
  });
  if (!source) return of_keys;
  Tensor factors = empty_cpu<1>({source->numel()}, aoti_torch_dtype_float32());
  const int32_t* at = source->const_data_ptr<int32_t>();
  float* out = factors.mutable_data_ptr<float>();
  std::atomic<bool> fit{true};
  torch::stable::parallel_for(0, source->numel(), kKeysPerThread, [&](int64_t begin, int64_t end) {
    if (!kernels().gather(all, num_keys, at + begin, end - begin, out + begin)) fit = false;
  });
  STD_TORCH_CHECK(fit, "`source` must be in [0, ", num_keys, ")");
  return factors;
}

void refuse(const ScaledRows& in, int64_t lookup) {
  STD_TORCH_CHECK(in.rows[lookup] >= 0 && in.rows[lookup] < in.num_rows, "`rows` must be in [0, ",
                  in.num_rows, "), got ", in.rows[lookup]);
  STD_TORCH_CHECK(false, "`source` must be in [0, ", in.num_ids, "), got ", in.source[lookup]);
}

// What the rows add to the gradient of lines, a piece for each block of samples, in `all`.
std::vector<LinePiece> line_pieces(const LineEncoder& encoder, const ScaledRows& in,
                                   int64_t num_samples, LineGradient* all) {
  const int64_t per_block = std::max<int64_t>(1, kBagsPerBlock / (1 + in.num_wanted));
  std::vector<LinePiece> pieces(num_blocks(num_samples, per_block));
  std::vector<int64_t> wrong(pieces.size(), -1);
  each_block(num_samples, per_block, [&](int64_t block, int64_t begin, int64_t end) {
    LineGradient* out = all + in.offsets[begin * in.num_features];
    pieces[block] = {out, kernels().line_gradients(encoder, in, begin, end, out, wrong[block])};
  });
  for (const int64_t lookup : wrong) {
    if (lookup >= 0) refuse(in, lookup);
  }
  return pieces;
}

std::tuple<Tensor, Tensor> factor_gradients_cpu(const Tensor& grad, const Tensor& table,
                                                const Tensor& rows, const Tensor& offsets,
                                                const Tensor& source, const Tensor& keys,
                                                const Tensor& shards, std::optional<Tensor> given,
                                                const Tensor& features, int64_t shards_held,
                                                int64_t weights_per_shard, int64_t num_hashes) {
  check_factor_gradients(grad, table, rows, offsets, source, keys, shards, given, features);
  check_keys(keys, shards, shards_held, weights_per_shard, num_hashes);
  std::vector<int64_t> tracked;
  for (int64_t f = 0; f < features.numel(); ++f) {
    if (features.const_data_ptr<int64_t>()[f] >= 0) tracked.push_back(f);
  }
  const ScaledRows in{grad.const_data_ptr<float>(),
                      table.data_ptr(),
                      table.scalar_type() == ScalarType::Half,
                      table.size(1),
                      rows.const_data_ptr<int64_t>(),
                      offsets.const_data_ptr<int64_t>(),
                      source.const_data_ptr<int32_t>(),
                      keys.const_data_ptr<int64_t>(),
                      shards.const_data_ptr<int32_t>(),
                      given ? given->const_data_ptr<float>() : nullptr,
                      tracked.data(),
                      static_cast<int64_t>(tracked.size()),
                      features.numel(),
                      table.size(0),
                      keys.numel()};
  check_offsets(in.offsets, offsets.numel(), rows.numel());
  check_shards(in.shards, in.num_ids, shards_held);
  if (in.num_ids == 0 && rows.numel() > 0) refuse(in, 0);
  const LineEncoder encoder(shards_held, weights_per_shard, static_cast<int>(num_hashes));
  const std::unique_ptr<LineGradient[]> all(new LineGradient[rows.numel()]);
  const auto in_parallel = [](int64_t tasks, const auto& run) {
    each_block(tasks, 1, [&](int64_t task, int64_t, int64_t) { run(task); });
  };
  const LineSums sums(kernels(),
                      line_pieces(encoder, in, grad.size(0) / in.num_features, all.get()),
                      encoder.num_lines(), in_parallel);
  Tensor lines = empty_cpu<1>({sums.size()}, aoti_torch_dtype_int64());
  Tensor grads = empty_cpu<2>({sums.size(), kLineWeights}, aoti_torch_dtype_float32());
  sums.write(lines.mutable_data_ptr<int64_t>(), grads.mutable_data_ptr<float>(), in_parallel);
  return {lines, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("factor_gradients", TORCH_BOX(&factor_gradients_cpu));
  m.impl("key_factors", TORCH_BOX(&key_factors_cpu));
}

}  // namespace torchrec_cafe
