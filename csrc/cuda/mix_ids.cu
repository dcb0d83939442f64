#include "checks.h"
#include "hash.h"
#include "launch.cuh"

namespace torchrec_cafe {
namespace {

__global__ void mix_ids_kernel(const int64_t* __restrict__ ids, int64_t num_ids,
                               const int64_t* __restrict__ offsets,
                               const int64_t* __restrict__ sizes, int64_t num_features,
                               unsigned long long* out_of_range, int64_t* __restrict__ mixed) {
  for (int64_t i = first_index(); i < num_ids; i += index_stride()) {
    const int64_t feature = part_of(offsets, num_features, i);
    const int64_t n = sizes[feature];
    if (n == 0) {
      mixed[i] = ids[i];
    } else if (ids[i] < 0 || ids[i] >= n) {
      mixed[i] = mix_id(0, n);
      atomicAdd(out_of_range + feature, 1ULL);
    } else {
      mixed[i] = mix_id(ids[i], n);
    }
  }
}

Tensor mix_ids_cuda(const Tensor& ids, const Tensor& feature_offsets, const Tensor& num_embeddings,
                    const Tensor& out_of_range) {
  check_mix_ids(ids, feature_offsets, num_embeddings, out_of_range);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  Tensor mixed = torch::stable::empty_like(ids);
  const int64_t num_ids = ids.numel();
  if (num_ids == 0 || num_embeddings.numel() == 0) return mixed;
  launch(current_stream(ids), num_ids, mix_ids_kernel, ids.const_data_ptr<int64_t>(), num_ids,
         feature_offsets.const_data_ptr<int64_t>(), num_embeddings.const_data_ptr<int64_t>(),
         num_embeddings.numel(),
         reinterpret_cast<unsigned long long*>(out_of_range.mutable_data_ptr<int64_t>()),
         mixed.mutable_data_ptr<int64_t>());
  return mixed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("mix_ids", TORCH_BOX(&mix_ids_cuda));
}

}  // namespace torchrec_cafe
