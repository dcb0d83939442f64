// Bags whose ids have up to two rows, which the TBE adds up.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
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

  TwoRowsOutput(int64_t num_rows, int64_t num_bags, bool with_source)
      : rows(empty_cpu<1>({num_rows}, aoti_torch_dtype_int64())),
        offsets(empty_cpu<1>({num_bags + 1}, aoti_torch_dtype_int64())),
        source(empty_cpu<1>({with_source ? num_rows : 0}, aoti_torch_dtype_int32())) {
    offsets.mutable_data_ptr<int64_t>()[num_bags] = num_rows;
  }
};

void check_offsets(const int64_t* offsets, int64_t size, int64_t num_ids) {
  STD_TORCH_CHECK(
      kernels().offsets_ascend(offsets, size) && offsets[0] == 0 && offsets[size - 1] == num_ids,
      "`offsets` must ascend from 0 to the number of ids, ", num_ids);
}

// Samples that a thread takes at a time.
int64_t samples_per_block(int64_t num_features) {
  return std::max<int64_t>(1, kBags / num_features);
}

// Number of second rows of the ids [begin, end).
int64_t count_second(const int32_t* second, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) count += second[i] >= 0;
  return count;
}

// The rows of bags, sample-major, and the second rows of their ids, feature-major.
struct TwoLevels {
  const int64_t* rows;
  const int64_t* offsets;
  const int64_t* id_offsets;
  const int32_t* second;
  int64_t num_features;
  int64_t batch_size;
  int64_t hot_offset;

  int64_t count(int64_t first, int64_t last) const {
    int64_t size = offsets[last * num_features] - offsets[first * num_features];
    for (int64_t f = 0; f < num_features; ++f) {
      const int64_t* ids = id_offsets + f * batch_size;
      size += count_second(second, ids[first], ids[last]);
    }
    return size;
  }

  void write(int64_t first, int64_t last, int64_t next, const TwoRowsOutput& out) const {
    int64_t* out_rows = static_cast<int64_t*>(out.rows.data_ptr());
    int64_t* out_offsets = static_cast<int64_t*>(out.offsets.data_ptr());
    int32_t* out_source =
        out.source.numel() > 0 ? static_cast<int32_t*>(out.source.data_ptr()) : nullptr;
    for (int64_t bag = first * num_features; bag < last * num_features; ++bag) {
      out_offsets[bag] = next;
      const int64_t begin = offsets[bag];
      const int64_t first_id = id_offsets[bag % num_features * batch_size + bag / num_features];
      for (int64_t i = 0; i < offsets[bag + 1] - begin; ++i) {
        const int32_t other = second[first_id + i];
        if (out_source != nullptr) out_source[next] = static_cast<int32_t>(first_id + i);
        out_rows[next++] = rows[begin + i];
        if (other < 0) continue;
        if (out_source != nullptr) out_source[next] = static_cast<int32_t>(first_id + i);
        out_rows[next++] = hot_offset + other;
      }
    }
  }
};

Rows add_second_rows_cpu(const Tensor& rows, const Tensor& offsets, const Tensor& id_offsets,
                         const Tensor& second, int64_t num_features, int64_t hot_offset,
                         bool with_source) {
  check_second_rows(rows, offsets, id_offsets, second, num_features);
  const int64_t num_bags = offsets.numel() - 1;
  const TwoLevels in{rows.const_data_ptr<int64_t>(),
                     offsets.const_data_ptr<int64_t>(),
                     id_offsets.const_data_ptr<int64_t>(),
                     second.const_data_ptr<int32_t>(),
                     num_features,
                     num_bags / num_features,
                     hot_offset};
  check_offsets(in.offsets, num_bags + 1, rows.numel());
  check_offsets(in.id_offsets, num_bags + 1, rows.numel());
  for (int64_t bag = 0; bag < num_bags; ++bag) {
    const int64_t* ids = in.id_offsets + bag % num_features * in.batch_size + bag / num_features;
    STD_TORCH_CHECK(ids[1] - ids[0] == in.offsets[bag + 1] - in.offsets[bag],
                    "`id_offsets` must have the lengths of `offsets`, feature-major");
  }
  const int64_t samples = samples_per_block(num_features);
  const int64_t num_blocks = (in.batch_size + samples - 1) / samples;
  std::vector<int64_t> first(num_blocks + 1, 0);  // where each block's rows begin
  const auto each_block = [&](const auto& run) {
    torch::stable::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        run(block, block * samples, std::min(in.batch_size, (block + 1) * samples));
      }
    });
  };
  each_block(
      [&](int64_t block, int64_t begin, int64_t end) { first[block + 1] = in.count(begin, end); });
  std::partial_sum(first.begin(), first.end(), first.begin());
  const TwoRowsOutput out(first[num_blocks], num_bags, with_source);
  each_block(
      [&](int64_t block, int64_t begin, int64_t end) { in.write(begin, end, first[block], out); });
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
  TwoRowsOutput out(2 * num_ids, num_bags, true);
  int64_t* out_rows = out.rows.mutable_data_ptr<int64_t>();
  int64_t* out_offsets = out.offsets.mutable_data_ptr<int64_t>();
  int32_t* out_source = out.source.mutable_data_ptr<int32_t>();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<QuotientRemainder> maps;
  for (int64_t f = 0; f < num_features; ++f) {
    maps.push_back(QuotientRemainder::load(tables.const_data_ptr<int64_t>(), f));
  }
  const int64_t samples = samples_per_block(num_features);
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
