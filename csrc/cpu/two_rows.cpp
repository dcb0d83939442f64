// Bags whose ids have up to two rows, which the TBE adds up.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/offsets.h"
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

// The rows of bags, and the second rows of some of them.
struct TwoLevels {
  const int64_t* rows;
  const int64_t* offsets;
  const int32_t* source;  // or null
  const int32_t* second;
  int64_t hot_offset;

  // Number of rows of the bags [begin, end), with second rows.
  int64_t count(int64_t begin, int64_t end) const {
    int64_t size = offsets[end] - offsets[begin];
    for (int64_t i = offsets[begin]; i < offsets[end]; ++i) size += second[i] >= 0;
    return size;
  }

  void write(int64_t begin, int64_t end, int64_t next, TwoRowsOutput& out) const {
    int64_t* out_rows = out.rows.mutable_data_ptr<int64_t>();
    int64_t* out_offsets = out.offsets.mutable_data_ptr<int64_t>();
    int32_t* out_source = source == nullptr ? nullptr : out.source.mutable_data_ptr<int32_t>();
    for (int64_t bag = begin; bag < end; ++bag) {
      out_offsets[bag] = next;
      for (int64_t i = offsets[bag]; i < offsets[bag + 1]; ++i) {
        if (source != nullptr) out_source[next] = source[i];
        out_rows[next++] = rows[i];
        if (second[i] < 0) continue;
        if (source != nullptr) out_source[next] = source[i];
        out_rows[next++] = hot_offset + second[i];
      }
    }
  }
};

Rows add_second_rows_cpu(const Tensor& rows, const Tensor& offsets, const Tensor& source,
                         const Tensor& second, int64_t hot_offset) {
  check_second_rows(rows, offsets, source, second);
  const int64_t num_bags = offsets.numel() - 1;
  const bool with_source = source.numel() > 0;
  const TwoLevels in{rows.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(),
                     with_source ? source.const_data_ptr<int32_t>() : nullptr,
                     second.const_data_ptr<int32_t>(), hot_offset};
  check_offsets(in.offsets, num_bags + 1, rows.numel());
  std::vector<int64_t> first(num_blocks(num_bags, kBags) + 1, 0);  // where each block's rows begin
  each_block(num_bags, kBags, [&](int64_t block, int64_t begin, int64_t end) {
    first[block + 1] = in.count(begin, end);
  });
  std::partial_sum(first.begin(), first.end(), first.begin());
  TwoRowsOutput out(first.back(), num_bags, with_source);
  each_block(num_bags, kBags, [&](int64_t block, int64_t begin, int64_t end) {
    in.write(begin, end, first[block], out);
  });
  return {out.rows, out.offsets, out.source};
}

Rows quotient_remainder_cpu(const Tensor& ids, const Tensor& offsets, const Tensor& tables) {
  check_quotient_remainder(ids, offsets, tables);
  check_table_values(tables);
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
  const int64_t samples = std::max<int64_t>(1, kBags / num_features);
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
