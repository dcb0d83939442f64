// Bags whose ids have up to two rows, which the TBE adds up.
#include <tuple>

#include "checks.h"
#include "launch.cuh"
#include "scan.cuh"
#include "sketch_tensors.h"

namespace torchrec_cafe {
namespace {

using Rows = std::tuple<Tensor, Tensor, Tensor>;

// The rows of bags, and the second rows of some of them. Offsets out of range are cut.
struct TwoLevels {
  const int64_t* rows;
  const int64_t* offsets;
  const int32_t* source;  // or null
  const int32_t* second;
  int64_t num_rows;
  int64_t num_bags;
  int64_t hot_offset;

  __device__ int64_t begin(int64_t bag) const { return max(offsets[bag], int64_t{0}); }
  __device__ int64_t end(int64_t bag) const { return min(offsets[bag + 1], num_rows); }
};

// lengths[1 + bag] = rows of the bag; lengths[0] = 0.
__global__ void count_rows_kernel(TwoLevels in, int64_t* __restrict__ lengths) {
  for (int64_t bag = first_index(); bag < in.num_bags; bag += index_stride()) {
    int64_t length = 0;
    for (int64_t i = in.begin(bag); i < in.end(bag); ++i) length += in.second[i] >= 0 ? 2 : 1;
    lengths[1 + bag] = length;
    if (bag == 0) lengths[0] = 0;
  }
}

__global__ void write_rows_kernel(TwoLevels in, const int64_t* __restrict__ out_offsets,
                                  int64_t* __restrict__ rows, int32_t* __restrict__ source) {
  for (int64_t bag = first_index(); bag < in.num_bags; bag += index_stride()) {
    int64_t next = out_offsets[bag];
    for (int64_t i = in.begin(bag); i < in.end(bag); ++i) {
      if (in.source != nullptr) source[next] = in.source[i];
      rows[next++] = in.rows[i];
      if (in.second[i] < 0) continue;
      if (in.source != nullptr) source[next] = in.source[i];
      rows[next++] = in.hot_offset + in.second[i];
    }
  }
}

Rows add_second_rows_cuda(const Tensor& rows, const Tensor& offsets, const Tensor& source_in,
                          const Tensor& second, int64_t hot_offset) {
  check_second_rows(rows, offsets, source_in, second);
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows);
  const int64_t num_bags = offsets.numel() - 1;
  const bool with_source = source_in.numel() > 0;
  const TwoLevels in{rows.const_data_ptr<int64_t>(),
                     offsets.const_data_ptr<int64_t>(),
                     with_source ? source_in.const_data_ptr<int32_t>() : nullptr,
                     second.const_data_ptr<int32_t>(),
                     rows.numel(),
                     num_bags,
                     hot_offset};
  const Tensor lengths = torch::stable::new_zeros(rows, {num_bags + 1});
  if (num_bags > 0) {
    launch(stream, num_bags, count_rows_kernel, in, static_cast<int64_t*>(lengths.data_ptr()));
  }
  Tensor out_offsets = cumsum(lengths);
  const int64_t size = last_value(out_offsets, stream);
  Tensor out_rows = torch::stable::new_empty(rows, {size});
  Tensor source = torch::stable::new_empty(second, {with_source ? size : 0});
  if (num_bags > 0) {
    launch(stream, num_bags, write_rows_kernel, in, out_offsets.const_data_ptr<int64_t>(),
           out_rows.mutable_data_ptr<int64_t>(),
           with_source ? source.mutable_data_ptr<int32_t>() : nullptr);
  }
  return {out_rows, out_offsets, source};
}

__global__ void double_lengths_kernel(const int64_t* __restrict__ offsets, int64_t num_ids,
                                      int64_t num_features, int64_t batch_size,
                                      int64_t* __restrict__ lengths) {
  for (int64_t bag = first_index(); bag < num_features * batch_size; bag += index_stride()) {
    const int64_t* in = offsets + bag % num_features * batch_size + bag / num_features;
    lengths[1 + bag] = 2 * bag_length(in, num_ids);
    if (bag == 0) lengths[0] = 0;
  }
}

__global__ void quotient_remainder_kernel(const int64_t* __restrict__ ids, int64_t num_ids,
                                          const int64_t* __restrict__ offsets,
                                          const int64_t* __restrict__ tables, int64_t num_features,
                                          int64_t batch_size,
                                          const int64_t* __restrict__ out_offsets,
                                          int64_t* __restrict__ rows,
                                          int32_t* __restrict__ source) {
  for (int64_t bag = first_index(); bag < num_features * batch_size; bag += index_stride()) {
    const int64_t feature = bag % num_features;
    const auto map = QuotientRemainder::load(tables, feature);
    const int64_t first = bag_begin(offsets + feature * batch_size + bag / num_features);
    const int64_t end = min(out_offsets[bag + 1], 2 * num_ids);
    for (int64_t i = out_offsets[bag]; i + 1 < end; i += 2) {
      const int64_t from = first + (i - out_offsets[bag]) / 2;
      if (from < 0 || from >= num_ids) continue;
      const QuotientRemainder::Rows pair = map.rows(ids[from]);
      rows[i] = pair.remainder;
      rows[i + 1] = pair.quotient;
      source[i] = source[i + 1] = static_cast<int32_t>(from);
    }
  }
}

Rows quotient_remainder_cuda(const Tensor& ids, const Tensor& offsets, const Tensor& tables) {
  check_quotient_remainder(ids, offsets, tables);
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  const int64_t num_bags = offsets.numel() - 1;
  const int64_t num_features = tables.size(0);
  const int64_t num_ids = ids.numel();
  // Zeros, so that whatever offsets cannot be mapped points nowhere out of bounds.
  Tensor rows = torch::stable::new_zeros(ids, {2 * num_ids});
  Tensor source = torch::stable::new_zeros(ids, {2 * num_ids}, ScalarType::Int);
  Tensor lengths = torch::stable::new_zeros(ids, {num_bags + 1});
  if (num_bags == 0) return {rows, lengths, source};
  const cudaStream_t stream = current_stream(ids);
  launch(stream, num_bags, double_lengths_kernel, offsets.const_data_ptr<int64_t>(), num_ids,
         num_features, num_bags / num_features, lengths.mutable_data_ptr<int64_t>());
  Tensor out_offsets = cumsum(lengths);
  launch(stream, num_bags, quotient_remainder_kernel, ids.const_data_ptr<int64_t>(), num_ids,
         offsets.const_data_ptr<int64_t>(), tables.const_data_ptr<int64_t>(), num_features,
         num_bags / num_features, out_offsets.const_data_ptr<int64_t>(),
         rows.mutable_data_ptr<int64_t>(), source.mutable_data_ptr<int32_t>());
  return {rows, out_offsets, source};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAFE_NAMESPACE, CAFE_DEVICE, m) {
  m.impl("add_second_rows", TORCH_BOX(&add_second_rows_cuda));
  m.impl("quotient_remainder", TORCH_BOX(&quotient_remainder_cuda));
}

}  // namespace torchrec_cafe
