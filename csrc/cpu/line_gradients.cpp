#include "cpu/line_gradients.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/offsets.h"
#include "cpu/tensors.h"

namespace torchrec_cafe {
namespace {

constexpr int64_t kBagsPerBlock = 1024;

void refuse(const ScaledRows& in, int64_t lookup) {
  STD_TORCH_CHECK(in.rows[lookup] >= 0 && in.rows[lookup] < in.num_rows, "`rows` must be in [0, ",
                  in.num_rows, "), got ", in.rows[lookup]);
  STD_TORCH_CHECK(false, "`source` must be in [0, ", in.num_ids, "), got ", in.source[lookup]);
}

}  // namespace

std::vector<int64_t> tracked_features(const Tensor& features) {
  std::vector<int64_t> tracked;
  for (int64_t f = 0; f < features.numel(); ++f) {
    if (features.const_data_ptr<int64_t>()[f] >= 0) tracked.push_back(f);
  }
  return tracked;
}

LineGradients::LineGradients(const Tensor& grad, const Tensor& table, const Tensor& rows,
                             const Tensor& offsets, const Tensor& source, const Tensor& keys,
                             const Tensor& shards, const std::optional<Tensor>& given,
                             const Tensor& features, const LineEncoder& encoder)
    : encoder_(encoder) {
  check_factor_gradients(grad, table, rows, offsets, source, keys, shards, given, features);
  tracked_ = tracked_features(features);
  in_ = {grad.const_data_ptr<float>(),
         table.data_ptr(),
         table.scalar_type() == ScalarType::Half,
         table.size(1),
         rows.const_data_ptr<int64_t>(),
         offsets.const_data_ptr<int64_t>(),
         source.const_data_ptr<int32_t>(),
         keys.const_data_ptr<int64_t>(),
         shards.const_data_ptr<int32_t>(),
         given ? given->const_data_ptr<float>() : nullptr,
         tracked_.data(),
         static_cast<int64_t>(tracked_.size()),
         features.numel(),
         table.size(0),
         keys.numel()};
  num_samples_ = grad.size(0) / in_.num_features;
  check_offsets(in_.offsets, offsets.numel(), rows.numel());
  STD_TORCH_CHECK(kernels().shards_fit(in_.shards, in_.num_ids, encoder_.shards_held),
                  "`shards` must be -1 or in [0, ", encoder_.shards_held, ")");
  if (in_.num_ids == 0 && rows.numel() > 0) refuse(in_, 0);
  all_.reset(new LineGradient[rows.numel()]);
}

int64_t LineGradients::samples_per_block() const {
  return std::max<int64_t>(1, kBagsPerBlock / (1 + in_.num_wanted));
}

void LineGradients::set_blocks(int64_t num_blocks) {
  pieces_.assign(num_blocks, {nullptr, 0});
  wrong_.assign(num_blocks, -1);
}

void LineGradients::read(int64_t block, int64_t begin, int64_t end) {
  LinePiece& piece = pieces_[block];
  if (piece.begin == nullptr) piece.begin = all_.get() + in_.offsets[begin * in_.num_features];
  piece.size +=
      kernels().line_gradients(encoder_, in_, begin, end, piece.begin + piece.size, wrong_[block]);
}

void LineGradients::check_read() const {
  for (const int64_t lookup : wrong_) {
    if (lookup >= 0) refuse(in_, lookup);
  }
}

std::tuple<Tensor, Tensor> LineGradients::sums() {
  const auto in_parallel = [](int64_t tasks, const auto& run) {
    each_block(tasks, 1, [&](int64_t task, int64_t, int64_t) { run(task); });
  };
  const LineSums sums(kernels(), std::move(pieces_), encoder_.num_lines(), in_parallel);
  Tensor lines = empty_cpu<1>({sums.size()}, aoti_torch_dtype_int64());
  Tensor grads = empty_cpu<2>({sums.size(), kLineWeights}, aoti_torch_dtype_float32());
  sums.write(lines.mutable_data_ptr<int64_t>(), grads.mutable_data_ptr<float>(), in_parallel);
  return {lines, grads};
}

namespace {

std::tuple<Tensor, Tensor> factor_gradients_cpu(const Tensor& grad, const Tensor& table,
                                                const Tensor& rows, const Tensor& offsets,
                                                const Tensor& source, const Tensor& keys,
                                                const Tensor& shards, std::optional<Tensor> given,
                                                const Tensor& features, int64_t shards_held,
                                                int64_t weights_per_shard, int64_t num_hashes) {
  check_keys(keys, shards, shards_held, weights_per_shard, num_hashes);
  LineGradients gradients(
      grad, table, rows, offsets, source, keys, shards, given, features,
      LineEncoder(shards_held, weights_per_shard, static_cast<int>(num_hashes)));
  const int64_t per_block = gradients.samples_per_block();
  gradients.set_blocks(num_blocks(gradients.num_samples(), per_block));
  each_block(gradients.num_samples(), per_block,
             [&](int64_t block, int64_t begin, int64_t end) { gradients.read(block, begin, end); });
  gradients.check_read();
  return gradients.sums();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("factor_gradients", TORCH_BOX(&factor_gradients_cpu));
}

}  // namespace torchrec_cafe
