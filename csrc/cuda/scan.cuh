// Where bags begin, from their lengths, and how much there is in all.
#pragma once

#include <array>

#include "launch.cuh"

namespace torchrec_cafe {

// The part of a bag that is in [0, size), from its two offsets, which may be anything: no sum of
// lengths overflows then.
__device__ inline int64_t bag_begin(const int64_t* offsets) { return max(offsets[0], int64_t{0}); }
__device__ inline int64_t bag_length(const int64_t* offsets, int64_t size) {
  return max(min(offsets[1], size) - bag_begin(offsets), int64_t{0});
}

inline torch::stable::Tensor cumsum(const torch::stable::Tensor& tensor) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(int64_t{0}),
      torch::stable::detail::from(
          std::optional<torch::headeronly::ScalarType>(torch::headeronly::ScalarType::Long))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// The last number of an int64 tensor; waits for the device.
inline int64_t last_value(const torch::stable::Tensor& tensor, cudaStream_t stream) {
  int64_t value = 0;
  const auto* from = static_cast<const int64_t*>(tensor.data_ptr()) + tensor.numel() - 1;
  STD_CUDA_CHECK(cudaMemcpyAsync(&value, from, sizeof(value), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return value;
}

}  // namespace torchrec_cafe
