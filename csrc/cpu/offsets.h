// What the CPU operators check of values: where the bags of a batch begin, what tables are.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "row_map.h"

namespace torchrec_cafe {

inline void check_offsets(const int64_t* offsets, int64_t size, int64_t num_ids) {
  STD_TORCH_CHECK(
      kernels().offsets_ascend(offsets, size) && offsets[0] == 0 && offsets[size - 1] == num_ids,
      "`offsets` must ascend from 0 to the number of ids, ", num_ids);
}

// Rows of `tables`, as torchrec_cafe/ops describes its columns.
inline void check_table_values(const torch::stable::Tensor& tables) {
  const int64_t* row = tables.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tables.size(0); ++t, row += kTableColumns) {
    const int64_t most_rows = std::max<int64_t>(row[0], kMostShards);
    const bool fits = row[0] >= 1 && row[0] < kMostIds && row[1] >= 1 && row[1] <= most_rows &&
                      row[2] >= 0 && row[2] <= row[0] && row[4] >= -1 && row[4] < kMostTables;
    STD_TORCH_CHECK(fits, "`tables` must have ids in [1, 2**47), rows in [1, ids] or shards in ",
                    "[1, 2**16], a first id in [0, ids] and an index in [-1, 2**15), got ", row[0],
                    ", ", row[1], ", ", row[2], " and ", row[4]);
  }
}

}  // namespace torchrec_cafe
