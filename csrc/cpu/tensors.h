// Tensors that an operator returns. Straight from the allocator: the stable ABI's own factories go
// through the dispatcher, which costs more than a small batch takes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>

namespace torchrec_cafe {

template <size_t kDims>
torch::stable::Tensor empty_cpu(const std::array<int64_t, kDims>& sizes, int32_t dtype) {
  std::array<int64_t, kDims> strides;
  int64_t stride = 1;
  for (size_t d = kDims; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDims, sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace torchrec_cafe
