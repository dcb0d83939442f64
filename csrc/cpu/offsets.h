// Where the bags of a batch begin, as the CPU operators check it.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"

namespace torchrec_cafe {

inline void check_offsets(const int64_t* offsets, int64_t size, int64_t num_ids) {
  STD_TORCH_CHECK(
      kernels().offsets_ascend(offsets, size) && offsets[0] == 0 && offsets[size - 1] == num_ids,
      "`offsets` must ascend from 0 to the number of ids, ", num_ids);
}

}  // namespace torchrec_cafe
