// What every launch needs: the current stream, a device guard, a grid, a check.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>

// Tests compile these sources for the CPU, too, and register them elsewhere; see docs/cuda.md.
#if !defined(CAFE_NAMESPACE)
#define CAFE_NAMESPACE torchrec_cafe
#define CAFE_DEVICE CUDA
#define CAFE_MAX_BLOCKS 65535
#endif

namespace torchrec_cafe {

inline constexpr int kThreads = 256;
inline constexpr int kWarp = 32;
inline constexpr int64_t kMaxBlocks = CAFE_MAX_BLOCKS;  // of a kernel that loops

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches a kernel with so many blocks of kThreads threads.
template <typename... Params, typename... Args>
void launch_blocks(cudaStream_t stream, int64_t blocks, void (*kernel)(Params...), Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

// Launches a kernel that takes n elements in steps of index_stride(): none, if there are none.
template <typename... Params, typename... Args>
void launch(cudaStream_t stream, int64_t n, void (*kernel)(Params...), Args&&... args) {
  if (n == 0) return;
  launch_blocks(stream, std::min((n + kThreads - 1) / kThreads, kMaxBlocks), kernel,
                std::forward<Args>(args)...);
}

__device__ inline int64_t first_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline int64_t index_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Which of `count` > 0 parts element i is in: the last that begins at or before i. Any, where the
// offsets do not ascend.
__device__ inline int64_t part_of(const int64_t* offsets, int64_t count, int64_t i) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= i ? low : high) = middle;
  }
  return low;
}

}  // namespace torchrec_cafe
