#include "pool_keys.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/offsets.h"
#include "cpu/tensors.h"
#include "slot_tensors.h"

namespace torchrec_cafe {
namespace {

// Bags of [features, batch] in the order [batch, features], as rows of one table.
std::tuple<Tensor, Tensor, Tensor> pool_keys_cpu(const Tensor& ids, const Tensor& offsets,
                                                 const Tensor& ranges, const Tensor& out_of_range) {
  check_tensor(ids, "ids", ScalarType::Long, 1);
  check_tensor(offsets, "offsets", ScalarType::Long, 1);
  check_words(ranges, "ranges", kRowRangeWords);
  check_tensor(out_of_range, "out_of_range", ScalarType::Long, 1);
  check_device(ids, offsets, ranges, out_of_range);
  check_apart(out_of_range, "out_of_range", ids, offsets, ranges);
  check_count(ids.numel(), "ids");
  const int64_t features = ranges.size(0);
  STD_TORCH_CHECK(features > 0 && out_of_range.numel() == features,
                  "out_of_range must have an element for each row of ranges");
  STD_TORCH_CHECK(offsets.numel() > 0 && (offsets.numel() - 1) % features == 0,
                  "offsets must have features * batch + 1 elements");
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  check_offsets(offset, offsets.numel(), ids.numel());
  const int64_t* range = ranges.const_data_ptr<int64_t>();
  const int64_t batch = (offsets.numel() - 1) / features;
  int64_t kept = ids.numel();
  for (int64_t f = 0; f < features; ++f) {
    STD_TORCH_CHECK(range[f * 2] >= 0 && range[f * 2 + 1] >= 0, "`ranges` must be >= 0, got ",
                    range[f * 2], " and ", range[f * 2 + 1]);
    // A rank may have no row of a table, and be sent ids that are out of range all the same.
    if (range[f * 2 + 1] == 0) kept -= offset[(f + 1) * batch] - offset[f * batch];
  }
  Tensor keys = empty_cpu<1>({kept}, aoti_torch_dtype_int64());
  Tensor out_offsets = torch::stable::empty_like(offsets);
  Tensor source = empty_cpu<1>({kept}, aoti_torch_dtype_int32());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  int64_t* key = keys.mutable_data_ptr<int64_t>();
  int64_t* out = out_offsets.mutable_data_ptr<int64_t>();
  int32_t* from = source.mutable_data_ptr<int32_t>();
  int64_t* bad = out_of_range.mutable_data_ptr<int64_t>();
  int64_t at = 0;
  *out++ = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t f = 0; f < features; ++f) {
      const int64_t* bag = offset + f * batch + b;
      for (int64_t i = bag[0]; i < bag[1]; ++i) {
        const PooledRow row = pooled_row(range + f * kRowRangeWords, id[i]);
        bad[f] += row.in_range ? 0 : 1;
        if (row.key == kNoRow) continue;
        key[at] = row.key;
        from[at++] = static_cast<int32_t>(i);
      }
      *out++ = at;
    }
  }
  return {keys, out_offsets, source};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("pool_keys", TORCH_BOX(&pool_keys_cpu)); }

}  // namespace torchrec_cafe
