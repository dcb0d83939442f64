#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/line_gradients.h"
#include "cpu/observe.h"
#include "cpu/offsets.h"

namespace torchrec_cafe {
namespace {

// Below this many numbers per thread, starting the threads costs more than they save.
constexpr int64_t kNumbersPerThread = 65536;

int64_t per_thread(int64_t numbers_per_item) {
  return std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers_per_item));
}

// Samples whose gradient a core's cache holds beside the rows that they are multiplied with.
int64_t samples_together(int64_t bytes_per_sample) {
  constexpr int64_t kBytes = 1 << 18;
  return std::clamp<int64_t>(kBytes / std::max<int64_t>(1, bytes_per_sample), 1, kNormBlock);
}

// Whether it is faster to read the gradients of all features than those of the tracked ones: memory
// is read faster line after line, a cache is not. Measured, see
// benchmarks/results/train_step_2-core-EPYC_2026-11-30.md.
bool reads_all(int64_t num_tracked, int64_t num_features, int64_t bytes) {
  constexpr int64_t kMostApart = 7;
  constexpr int64_t kCacheBytes = int64_t{1} << 23;
  return bytes > kCacheBytes && num_tracked * kMostApart >= num_features;
}

// Norms of a batch's bags, and what they make of its occurrences.
class BagNorms {
 public:
  // `features` are checked.
  BagNorms(const Tensor& grad, const Tensor& features)
      : tables_(features.const_data_ptr<int64_t>()),
        num_features_(features.numel()),
        num_samples_(grad.size(0) / features.numel()),
        tracked_(tracked_features(features)) {
    in_ = {grad.const_data_ptr<float>(),
           grad.size(1),
           num_features_,
           tracked_.data(),
           num_tracked(),
           reads_all(num_tracked(), num_features_, 4 * grad.numel())};
    block_size_ = num_tracked() * kNormBlock;
    sums_.resize(num_blocks() * num_tracked());
    norms_.reset(new float[num_blocks() * block_size_]);
  }

  int64_t num_blocks() const { return (num_samples_ + kNormBlock - 1) / kNormBlock; }

  // Reads the gradient once, by several threads; LineGradients of the same batch read along.
  void read(LineGradients* others) {
    const int64_t together = samples_together(4 * num_features_ * in_.dim);
    // Rows that are read along are worth a thread for each block, as in factor_gradients.
    const int64_t blocks_per_thread = others != nullptr ? 1 : per_thread(block_size_ * in_.dim);
    torch::stable::parallel_for(
        0, num_blocks(), blocks_per_thread, [&](int64_t begin, int64_t end) {
          for (int64_t block = begin; block < end; ++block) {
            const int64_t last = std::min((block + 1) * kNormBlock, num_samples_);
            for (int64_t b = block * kNormBlock; b < last; b += together) {
              const int64_t to = std::min(b + together, last);
              read(block, b, to);
              if (others != nullptr) others->read(block, b, to);
            }
          }
        });
  }

  // Adds each table's norms to its running mean, [num_shards, num_tables] of the same in all
  // shards. Then the norms are in units of the mean.
  void update_means(NormSum* norms, int64_t num_shards, int64_t num_tables, double decay) {
    std::vector<NormSum> seen(num_tables);
    for (int64_t t = 0; t < num_tracked(); ++t) {
      NormSum sum;
      for (size_t at = t; at < sums_.size(); at += tracked_.size()) sum.add(sums_[at]);
      seen[tables_[tracked_[t]]].add(sum);
    }
    for (int64_t t = 0; t < num_tables; ++t) {
      NormSum running = norms[t];
      running.decay(decay);
      running.add(seen[t]);
      for (int64_t s = 0; s < num_shards; ++s) norms[s * num_tables + t] = running;
    }
    for (const int64_t f : tracked_) scales_.push_back(norms[tables_[f]].scale());
  }

  // Writes the importance of the occurrences that are tracked.
  void weigh(const int64_t* offsets, const float* weights, float* importance) const {
    const int64_t per_feature = offsets[num_features_ * num_samples_] / num_features_;
    torch::stable::parallel_for(
        0, num_tracked(), per_thread(per_feature), [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            for (int64_t block = 0; block < num_blocks(); ++block) {
              const int64_t first = block * kNormBlock;
              kernels().weigh(norms_.get() + block * block_size_ + t * kNormBlock, scales_[t],
                              offsets + tracked_[t] * num_samples_ + first,
                              std::min(kNormBlock, num_samples_ - first), weights, importance);
            }
          }
        });
  }

  // Occurrences that are tracked: those of neighbouring features in one range.
  std::vector<Range> tracked_ranges(const int64_t* offsets) const {
    std::vector<Range> ranges;
    for (const int64_t f : tracked_) {
      const Range range{offsets[f * num_samples_], offsets[(f + 1) * num_samples_]};
      if (!ranges.empty() && ranges.back().end == range.begin) {
        ranges.back().end = range.end;
      } else {
        ranges.push_back(range);
      }
    }
    return ranges;
  }

 private:
  int64_t num_tracked() const { return static_cast<int64_t>(tracked_.size()); }

  void read(int64_t block, int64_t begin, int64_t end) {
    float* norms = norms_.get() + block * block_size_ + (begin - block * kNormBlock);
    kernels().bag_norms(in_, begin, end, norms, kNormBlock, sums_.data() + block * num_tracked());
  }

  BagGradients in_;
  const int64_t* tables_;  // of each feature
  int64_t num_features_;
  int64_t num_samples_;
  std::vector<int64_t> tracked_;
  int64_t block_size_;
  std::vector<NormSum> sums_;  // of each block and tracked feature
  // By block, then by feature: columns as long as the batch would share a set of the cache.
  std::unique_ptr<float[]> norms_;
  std::vector<float> scales_;  // of each tracked feature
};

void check_features(const Tensor& features, int64_t num_tables) {
  const int64_t* table = features.const_data_ptr<int64_t>();
  for (int64_t f = 0; f < features.numel(); ++f) {
    STD_TORCH_CHECK(table[f] >= -1 && table[f] < num_tables, "`features` must be in [-1, ",
                    num_tables, "), got ", table[f]);
  }
}

// `others` read the gradient along; nothing is learned if they refuse.
void learn_along(const Tensor& grad, const Tensor& offsets, const Tensor& keys,
                 const Tensor& shards, const std::optional<Tensor>& weights, const Tensor& features,
                 const Tensor& norms, const Tensor& buckets, const Tensor& inflation,
                 const Tensor& counters, double decay, double growth, LineGradients* others) {
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t num_shards = norms.size(0);
  check_offsets(offset, offsets.numel(), keys.numel());
  check_features(features, norms.size(1));
  BagNorms bags(grad, features);
  const std::vector<Range> ranges = bags.tracked_ranges(offset);
  for (const Range& range : ranges) check_shards(shards, range.begin, range.end, num_shards);
  if (others != nullptr) others->set_blocks(bags.num_blocks());
  if (num_shards == 0 && others == nullptr) return;
  bags.read(others);
  if (others != nullptr) others->check_read();
  if (num_shards == 0) return;
  bags.update_means(static_cast<NormSum*>(norms.data_ptr()), num_shards, norms.size(1), decay);
  const std::unique_ptr<float[]> importance(new float[keys.numel()]);
  bags.weigh(offset, weights ? weights->const_data_ptr<float>() : nullptr, importance.get());
  observe_checked(keys, shards, importance.get(), ranges, buckets, inflation, counters, growth);
}

void learn_cpu(const Tensor& grad, const Tensor& offsets, const Tensor& keys, const Tensor& shards,
               std::optional<Tensor> weights, const Tensor& features, const Tensor& norms,
               const Tensor& buckets, const Tensor& inflation, const Tensor& counters, double decay,
               double growth) {
  check_learn(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters);
  learn_along(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters,
              decay, growth, nullptr);
}

std::tuple<Tensor, Tensor> learn_scaled_cpu(
    const Tensor& grad, const Tensor& offsets, const Tensor& keys, const Tensor& shards,
    std::optional<Tensor> weights, const Tensor& features, const Tensor& norms,
    const Tensor& buckets, const Tensor& inflation, const Tensor& counters, double decay,
    double growth, const Tensor& table, const Tensor& rows, const Tensor& bag_offsets,
    const Tensor& source, const Tensor& taught, int64_t weights_per_shard, int64_t num_hashes) {
  check_learn(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters);
  check_apart_from_learned(norms, buckets, inflation, counters, table, rows, bag_offsets, source,
                           taught);
  check_keys(keys, taught, norms.size(0), weights_per_shard, num_hashes);
  LineGradients gradients(
      grad, table, rows, bag_offsets, source, keys, taught, weights, features,
      LineEncoder(norms.size(0), weights_per_shard, static_cast<int>(num_hashes)));
  learn_along(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters,
              decay, growth, &gradients);
  return gradients.sums();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("learn", TORCH_BOX(&learn_cpu));
  m.impl("learn_scaled", TORCH_BOX(&learn_scaled_cpu));
}

}  // namespace torchrec_cafe
