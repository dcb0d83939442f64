// Work cut into blocks whose size does not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace torchrec_cafe {

// Blocks of `per_block` elements, the last shorter.
inline int64_t num_blocks(int64_t size, int64_t per_block) {
  return (size + per_block - 1) / per_block;
}

// Calls run(block, first element, end) for each block, on several threads.
template <typename Run>
void each_block(int64_t size, int64_t per_block, const Run& run) {
  torch::stable::parallel_for(0, num_blocks(size, per_block), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      run(block, block * per_block, std::min(size, (block + 1) * per_block));
    }
  });
}

}  // namespace torchrec_cafe
