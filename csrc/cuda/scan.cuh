// Where bags begin, from their lengths.
#pragma once

#include <array>

#include "launch.cuh"

namespace torchrec_cafe {

inline torch::stable::Tensor cumsum(const torch::stable::Tensor& tensor) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(int64_t{0}),
      torch::stable::detail::from(
          std::optional<torch::headeronly::ScalarType>(torch::headeronly::ScalarType::Long))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace torchrec_cafe
