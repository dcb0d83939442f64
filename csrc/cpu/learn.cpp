#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/observe.h"
#include "cpu/offsets.h"

namespace torchrec_cafe {
namespace {

// Below this many numbers per thread, starting the threads costs more than they save.
constexpr int64_t kNumbersPerThread = 65536;

int64_t per_thread(int64_t numbers_per_item) {
  return std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers_per_item));
}

// Adds each table's norms of this batch to its running mean, and returns what to multiply the norms
// of each tracked feature by. `blocks` are sums of the norms of some samples, [.., tracked].
std::vector<float> update_means(const std::vector<NormSum>& blocks, const int64_t* tables,
                                const std::vector<int64_t>& tracked, NormSum* norms,
                                int64_t num_shards, int64_t num_tables, double decay) {
  std::vector<NormSum> seen(num_tables);
  for (size_t t = 0; t < tracked.size(); ++t) {
    NormSum sum;
    for (size_t at = t; at < blocks.size(); at += tracked.size()) sum.add(blocks[at]);
    seen[tables[tracked[t]]].add(sum);
  }
  for (int64_t t = 0; t < num_tables; ++t) {
    NormSum running = norms[t];
    running.decay(decay);
    running.add(seen[t]);
    for (int64_t s = 0; s < num_shards; ++s) norms[s * num_tables + t] = running;
  }
  std::vector<float> scales;
  for (const int64_t f : tracked) scales.push_back(norms[tables[f]].scale());
  return scales;
}

// Occurrences that are tracked: those of neighbouring features in one range.
std::vector<Range> tracked_ranges(const std::vector<int64_t>& tracked, const int64_t* offsets,
                                  int64_t num_samples) {
  std::vector<Range> ranges;
  for (const int64_t f : tracked) {
    const Range range{offsets[f * num_samples], offsets[(f + 1) * num_samples]};
    if (!ranges.empty() && ranges.back().end == range.begin) {
      ranges.back().end = range.end;
    } else {
      ranges.push_back(range);
    }
  }
  return ranges;
}

void check_features(const Tensor& features, int64_t num_tables) {
  const int64_t* table = features.const_data_ptr<int64_t>();
  for (int64_t f = 0; f < features.numel(); ++f) {
    STD_TORCH_CHECK(table[f] >= -1 && table[f] < num_tables, "`features` must be in [-1, ",
                    num_tables, "), got ", table[f]);
  }
}

void learn_cpu(const Tensor& grad, const Tensor& offsets, const Tensor& keys, const Tensor& shards,
               std::optional<Tensor> weights, const Tensor& features, const Tensor& norms,
               const Tensor& buckets, const Tensor& inflation, const Tensor& counters, double decay,
               double growth) {
  check_learn(grad, offsets, keys, shards, weights, features, norms, buckets, inflation, counters);
  const int64_t num_features = features.numel();
  const int64_t num_samples = grad.size(0) / num_features;
  const int64_t dim = grad.size(1);
  const int64_t num_shards = norms.size(0);
  const int64_t* table = features.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  check_offsets(offset, offsets.numel(), keys.numel());
  check_features(features, norms.size(1));
  std::vector<int64_t> tracked;
  for (int64_t f = 0; f < num_features; ++f) {
    if (table[f] >= 0) tracked.push_back(f);
  }
  const std::vector<Range> ranges = tracked_ranges(tracked, offset, num_samples);
  for (const Range& range : ranges) check_shards(shards, range.begin, range.end, num_shards);
  if (num_shards == 0) return;

  const auto num_tracked = static_cast<int64_t>(tracked.size());
  const int64_t num_blocks = (num_samples + kNormBlock - 1) / kNormBlock;
  std::vector<NormSum> sums(num_blocks * num_tracked);
  const std::unique_ptr<float[]> norm(new float[num_tracked * num_samples]);
  const float* gradient = grad.const_data_ptr<float>();
  torch::stable::parallel_for(
      0, num_blocks, per_thread(kNormBlock * num_tracked * dim), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kNormBlock;
          kernels().bag_norms(gradient + first * num_features * dim, dim, tracked.data(),
                              num_tracked, num_features, std::min(kNormBlock, num_samples - first),
                              norm.get() + first, num_samples, sums.data() + block * num_tracked);
        }
      });
  const std::vector<float> scales =
      update_means(sums, table, tracked, static_cast<NormSum*>(norms.data_ptr()), num_shards,
                   norms.size(1), decay);
  const std::unique_ptr<float[]> importance(new float[keys.numel()]);
  const float* weight = weights ? weights->const_data_ptr<float>() : nullptr;
  const int64_t per_feature = keys.numel() / num_features;
  torch::stable::parallel_for(
      0, num_tracked, per_thread(per_feature), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          kernels().weigh(norm.get() + t * num_samples, scales[t],
                          offset + tracked[t] * num_samples, num_samples, weight, importance.get());
        }
      });
  observe_checked(keys, shards, importance.get(), ranges, buckets, inflation, counters, growth);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("learn", TORCH_BOX(&learn_cpu)); }

}  // namespace torchrec_cafe
