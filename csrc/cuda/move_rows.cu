#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "launch.cuh"
#include "move_rows.h"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

// One warp for each row that may move.
template <typename T>
__global__ void move_rows_kernel(T* rows, int64_t num_rows, int64_t columns, RowMoves moves,
                                 float second_factor) {
  const int64_t warps = index_stride() / kWarp;
  for (int64_t i = first_index() / kWarp; i < moves.size(); i += warps) {
    const RowMove move = moves[i];
    if (move.action == kKeepRow || !fits(move, num_rows)) continue;
    for (int64_t d = threadIdx.x % kWarp; d < columns; d += kWarp) {
      move_element(rows, columns, move, d, second_factor);
    }
  }
}

template <typename T>
void move_all(const Tensor& rows, int64_t columns, const RowMoves& moves, float second_factor) {
  launch(current_stream(rows), moves.size() * kWarp, move_rows_kernel<T>,
         static_cast<T*>(rows.data_ptr()), rows.size(0), columns, moves, second_factor);
}

void move_rows_cuda(const Tensor& rows, const Tensor& actions, const Tensor& new_keys,
                    const Tensor& selected, const Tensor& tables, int64_t rows_per_shard,
                    int64_t hot_offset, double second_factor) {
  check_move_rows(rows, actions, new_keys, selected, tables, rows_per_shard);
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const RowMoves moves = row_moves(actions, new_keys, selected, tables, rows_per_shard, hot_offset);
  if (moves.size() == 0 || rows.numel() == 0) return;
  const int64_t columns = rows.numel() / rows.size(0);
  const auto factor = static_cast<float>(second_factor);
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return move_all<float>(rows, columns, moves, factor);
    case ScalarType::Half:
      return move_all<c10::Half>(rows, columns, moves, factor);
    default:
      return move_all<c10::BFloat16>(rows, columns, moves, factor);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("move_rows", TORCH_BOX(&move_rows_cuda));
}

}  // namespace torchrec_cafe
