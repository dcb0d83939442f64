// The state of a slot map in plain memory.
#pragma once

#include <vector>

#include "slot_plan.h"

namespace torchrec_cafe {

struct SlotState {
  std::vector<SlotEntry> entries;
  std::vector<Slot> slots;
  std::vector<int32_t> free;
  std::vector<RowUse> queue;
  std::vector<int64_t> counters;
  SlotMap map;

  SlotState(int64_t capacity, int64_t num_slots)
      : entries(capacity),
        slots(num_slots),
        free(num_slots),
        queue(capacity),
        counters(kNumSlotCounters),
        map{entries.data(), capacity,     slots.data(),   free.data(),
            num_slots,      queue.data(), counters.data()} {
    for (int64_t i = 0; i < num_slots; ++i) free[i] = static_cast<int32_t>(num_slots - 1 - i);
    counters[kFreeSlots] = num_slots;
  }

  SlotState(const SlotState&) = delete;

  bool has_room(int64_t rows) const {
    return counters[kUsedEntries] + rows <= map.capacity / 4 * 3;
  }
};

}  // namespace torchrec_cafe
