#include <torch/csrc/stable/library.h>

#include <cstring>

#include "slot_tensors.h"

namespace torchrec_cafe {
namespace {

// Rows ahead that are asked for: they are far apart in memory.
constexpr int64_t kRowPrefetch = 8;
constexpr int64_t kLine = 64;

// The rest of a row is asked for by the memory system itself, which sees a stream.
void prefetch_row(const char* row, int64_t bytes) {
  __builtin_prefetch(row);
  if (bytes > kLine) __builtin_prefetch(row + kLine);
}

void copy_rows_cpu(const Tensor& into, const Tensor& into_rows, const Tensor& from,
                   const Tensor& rows) {
  check_copies(into, into_rows, rows);
  check_rows(from, "from");
  check_device(into, from);
  check_apart(into, "into", into_rows, from, rows);
  STD_TORCH_CHECK(into.scalar_type() == from.scalar_type(), "from must have the dtype of into");
  if (rows.numel() == 0) return;
  check_row_numbers(into_rows, "into_rows", into.size(0));
  check_row_numbers(rows, "rows", from.size(0));
  const int64_t bytes = row_bytes(into);
  STD_TORCH_CHECK(row_bytes(from) == bytes, "from must have the columns of into");
  auto* to = static_cast<char*>(into.data_ptr());
  const auto* source = static_cast<const char*>(from.data_ptr());
  const int64_t* to_row = into_rows.const_data_ptr<int64_t>();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  // One thread: this runs beside the training, which has the cores.
  const int64_t size = rows.numel();
  for (int64_t i = 0; i < size; ++i) {
    if (i + kRowPrefetch < size) {
      prefetch_row(source + row[i + kRowPrefetch] * bytes, bytes);
      prefetch_row(to + to_row[i + kRowPrefetch] * bytes, bytes);
    }
    std::memcpy(to + to_row[i] * bytes, source + row[i] * bytes, bytes);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) { m.impl("copy_rows", TORCH_BOX(&copy_rows_cpu)); }

}  // namespace torchrec_cafe
