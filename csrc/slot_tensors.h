// Checks and views of a scratchpad's tensors.
#pragma once

#include "checks.h"
#include "slot_map.h"

namespace torchrec_cafe {

inline void check_words(const Tensor& tensor, const char* name, int64_t words) {
  check_tensor(tensor, name, ScalarType::Long, 2);
  STD_TORCH_CHECK(tensor.size(1) == words, name, " must have ", words, " words a row");
}

// The part of a slot map that announcing changes.
inline SlotMap row_map_view(const Tensor& entries, const Tensor& queue, const Tensor& counters) {
  check_words(entries, "entries", kSlotEntryWords);
  check_words(queue, "queue", kRowUseWords);
  check_tensor(counters, "counters", ScalarType::Long, 1);
  STD_TORCH_CHECK(counters.numel() == kNumSlotCounters, "counters has the wrong size");
  STD_TORCH_CHECK(queue.size(0) == entries.size(0), "queue must be as long as entries");
  STD_TORCH_CHECK(entries.size(0) > 1 && entries.size(0) < (int64_t{1} << 31),
                  "entries must be in [2, 2**31)");
  check_device(entries, queue, counters);
  check_apart(entries, "entries", queue, counters);
  check_apart(queue, "queue", counters);
  const int64_t* count = counters.const_data_ptr<int64_t>();
  const int64_t queued = count[kQueueTail] - count[kQueueHead];
  STD_TORCH_CHECK(count[kUsedEntries] >= 0 && count[kUsedEntries] < entries.size(0) &&
                      count[kQueueHead] >= 0 && queued >= 0 && queued <= entries.size(0),
                  "`counters` must be those of a slot map, with an empty entry");
  SlotMap map{};
  map.entries = static_cast<SlotEntry*>(entries.data_ptr());
  map.capacity = entries.size(0);
  map.queue = static_cast<RowUse*>(queue.data_ptr());
  map.counters = counters.mutable_data_ptr<int64_t>();
  return map;
}

inline SlotMap slot_map_view(const Tensor& entries, const Tensor& queue, const Tensor& counters,
                             const Tensor& slots, const Tensor& free) {
  SlotMap map = row_map_view(entries, queue, counters);
  check_words(slots, "slots", kSlotWords);
  check_tensor(free, "free", ScalarType::Int, 1);
  check_device(entries, slots, free);
  STD_TORCH_CHECK(free.numel() == slots.size(0), "free must be as long as slots");
  check_apart(slots, "slots", entries, queue, counters, free);
  check_apart(free, "free", entries, queue, counters);
  STD_TORCH_CHECK(map.counters[kFreeSlots] >= 0 && map.counters[kFreeSlots] <= slots.size(0),
                  "`counters` must have no more free slots than slots");
  map.slots = static_cast<Slot*>(slots.data_ptr());
  map.free = free.mutable_data_ptr<int32_t>();
  map.num_slots = slots.size(0);
  return map;
}

// Bytes of a row of a tensor whose first axis are rows.
inline int64_t row_bytes(const Tensor& rows) {
  return rows.size(0) > 0 ? rows.numel() / rows.size(0) * rows.element_size() : 0;
}

inline void check_rows(const Tensor& rows, const char* name) {
  STD_TORCH_CHECK(rows.dim() >= 1, name, " must have rows");
  STD_TORCH_CHECK(rows.is_contiguous(), name, " must be contiguous");
}

inline void check_row_numbers(const Tensor& numbers, const char* name, int64_t num_rows) {
  const int64_t* number = numbers.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    STD_TORCH_CHECK(number[i] >= 0 && number[i] < num_rows, "`", name, "` must be in [0, ",
                    num_rows, "), got ", number[i]);
  }
}

// Rows in memory and rows elsewhere, one each.
inline void check_copies(const Tensor& into, const Tensor& into_rows, const Tensor& rows) {
  check_rows(into, "into");
  check_tensor(into_rows, "into_rows", ScalarType::Long, 1);
  check_tensor(rows, "rows", ScalarType::Long, 1);
  check_device(into, into_rows, rows);
  STD_TORCH_CHECK(rows.numel() == into_rows.numel(), "rows must be as long as into_rows");
}

}  // namespace torchrec_cafe
