// Gradients of the weights of factors on a CPU, as the operators share them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/line_sums.h"
#include "factor_lines.h"

namespace torchrec_cafe {

// The features, of those that operators take, whose ids are tracked.
std::vector<int64_t> tracked_features(const torch::stable::Tensor& features);

// Reads the gradient of a batch's bags block by block, and adds up what it means for the weights.
// The tensors have to live on.
class LineGradients {
 public:
  // Checks everything but the values of rows and ids.
  LineGradients(const torch::stable::Tensor& grad, const torch::stable::Tensor& table,
                const torch::stable::Tensor& rows, const torch::stable::Tensor& offsets,
                const torch::stable::Tensor& source, const torch::stable::Tensor& keys,
                const torch::stable::Tensor& shards,
                const std::optional<torch::stable::Tensor>& given,
                const torch::stable::Tensor& features, const LineEncoder& encoder);

  int64_t num_samples() const { return num_samples_; }
  // Samples of a block at most, for blocks of about as many bags in any batch.
  int64_t samples_per_block() const;

  void set_blocks(int64_t num_blocks);
  // Reads samples [begin, end) of a block; those of a block one after the other.
  void read(int64_t block, int64_t begin, int64_t end);
  // Raises if a row or an id that was read is out of range.
  void check_read() const;
  // The lines that are hit, and the gradients of their weights.
  std::tuple<torch::stable::Tensor, torch::stable::Tensor> sums();

 private:
  LineEncoder encoder_;
  std::vector<int64_t> tracked_;
  ScaledRows in_;
  int64_t num_samples_;
  std::unique_ptr<LineGradient[]> all_;
  std::vector<LinePiece> pieces_;  // of each block, in `all_`
  std::vector<int64_t> wrong_;     // of each block, a lookup that is out of range, or -1
};

}  // namespace torchrec_cafe
