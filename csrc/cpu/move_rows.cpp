#include "move_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "cpu/offsets.h"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

template <typename T>
void move_all(void* rows, int64_t columns, const RowMoves& moves, float second_factor) {
  for (int64_t i = 0; i < moves.size(); ++i) {
    const RowMove move = moves[i];
    if (move.action == kKeepRow) continue;
    for (int64_t d = 0; d < columns; ++d) {
      move_element(static_cast<T*>(rows), columns, move, d, second_factor);
    }
  }
}

void move_rows_cpu(const Tensor& rows, const Tensor& actions, const Tensor& new_keys,
                   const Tensor& selected, const Tensor& tables, int64_t rows_per_shard,
                   int64_t hot_offset, double second_factor) {
  check_move_rows(rows, actions, new_keys, selected, tables, rows_per_shard);
  check_table_values(tables);
  const RowMoves moves = row_moves(actions, new_keys, selected, tables, rows_per_shard, hot_offset);
  const int64_t num_rows = rows.size(0);
  for (int64_t i = 0; i < moves.size(); ++i) {
    const RowMove move = moves[i];
    STD_TORCH_CHECK(move.action == kKeepRow || fits(move, num_rows),
                    "`rows` must hold every row that moves, got ", num_rows, " rows, and ", move.to,
                    ", ", move.from, " or ", move.second, " to move");
  }
  const int64_t columns = num_rows > 0 ? rows.numel() / num_rows : 0;
  const auto factor = static_cast<float>(second_factor);
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return move_all<float>(rows.data_ptr(), columns, moves, factor);
    case ScalarType::Half:
      return move_all<c10::Half>(rows.data_ptr(), columns, moves, factor);
    default:
      return move_all<c10::BFloat16>(rows.data_ptr(), columns, moves, factor);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("move_rows", TORCH_BOX(&move_rows_cpu)); }

}  // namespace torchrec_cafe
