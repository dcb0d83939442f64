#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

Tensor mix_ids_cpu(const Tensor& ids, const Tensor& feature_offsets, const Tensor& num_embeddings,
                   const Tensor& out_of_range) {
  check_mix_ids(ids, feature_offsets, num_embeddings, out_of_range);
  Tensor out = torch::stable::empty_like(ids);
  const int64_t* in = ids.const_data_ptr<int64_t>();
  const int64_t* offsets = feature_offsets.const_data_ptr<int64_t>();
  const int64_t* sizes = num_embeddings.const_data_ptr<int64_t>();
  int64_t* bad = out_of_range.mutable_data_ptr<int64_t>();
  int64_t* mixed = out.mutable_data_ptr<int64_t>();
  const int64_t num_features = num_embeddings.numel();
  int64_t last = 0;  // offsets that do not fit would send the loop below out of bounds
  for (int64_t f = 0; f <= num_features; ++f) {
    STD_TORCH_CHECK(offsets[f] >= last && offsets[f] <= ids.numel(),
                    "`feature_offsets` must ascend from 0 to the number of ids");
    last = offsets[f];
    STD_TORCH_CHECK(f == num_features || sizes[f] >= 0, "`num_embeddings` must be >= 0");
  }
  STD_TORCH_CHECK(offsets[0] == 0 && last == ids.numel(),
                  "`feature_offsets` must ascend from 0 to the number of ids");
  torch::stable::parallel_for(0, num_features, 1, [&](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      const int64_t size = offsets[f + 1] - offsets[f];
      if (sizes[f] == 0) {
        std::copy_n(in + offsets[f], size, mixed + offsets[f]);
      } else {
        bad[f] += kernels().mix(in + offsets[f], size, sizes[f], mixed + offsets[f]);
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("mix_ids", TORCH_BOX(&mix_ids_cpu)); }

}  // namespace torchrec_cafe
