#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/tensors.h"
#include "slot_plan.h"
#include "slot_tensors.h"

namespace torchrec_cafe {
namespace {

// Linear probing stays short, and a search always ends.
bool has_room(const SlotMap& map, int64_t rows) {
  return map.counters[kUsedEntries] + rows <= map.capacity / 4 * 3;
}

// The number of the newest batch that the map has rows of, or -1.
int64_t newest_batch(const SlotMap& map) {
  const int64_t tail = map.counters[kQueueTail];
  return tail > map.counters[kQueueHead] ? map.queue[(tail - 1) % map.capacity].last : -1;
}

std::tuple<Tensor, Tensor> announce_rows_cpu(const Tensor& keys, const Tensor& entries,
                                             const Tensor& queue, const Tensor& counters,
                                             int64_t number) {
  SlotMap map = row_map_view(entries, queue, counters);
  check_tensor(keys, "keys", ScalarType::Long, 1);
  check_device(keys, entries);
  check_apart(keys, "keys", entries, queue, counters);
  const int64_t size = keys.numel();
  const int64_t* key = keys.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(number >= 0 && number < INT32_MAX, "`number` must be in [0, 2**31 - 1)");
  STD_TORCH_CHECK(number > newest_batch(map), "`number` must be above ", newest_batch(map),
                  ", that of the batch before, got ", number);
  STD_TORCH_CHECK(has_room(map, size), "`state` must have room for ", size, " more rows");
  for (int64_t i = 0; i < size; ++i) {
    STD_TORCH_CHECK(key[i] >= 0, "`keys` must be >= 0, got ", key[i]);
  }
  std::vector<int64_t> distinct(size);
  Tensor positions = empty_cpu<1>({size}, aoti_torch_dtype_int32());
  const int64_t count = announce(map, key, size, static_cast<int32_t>(number), distinct.data(),
                                 positions.mutable_data_ptr<int32_t>());
  Tensor rows = empty_cpu<1>({count}, aoti_torch_dtype_int64());
  std::copy_n(distinct.data(), count, rows.mutable_data_ptr<int64_t>());
  return {rows, positions};
}

// Rows and slots of moves, as two tensors.
std::tuple<Tensor, Tensor> move_tensors(const std::vector<SlotMove>& moves) {
  const auto size = static_cast<int64_t>(moves.size());
  Tensor keys = empty_cpu<1>({size}, aoti_torch_dtype_int64());
  Tensor slots = empty_cpu<1>({size}, aoti_torch_dtype_int64());
  for (int64_t i = 0; i < size; ++i) {
    keys.mutable_data_ptr<int64_t>()[i] = moves[i].key;
    slots.mutable_data_ptr<int64_t>()[i] = moves[i].slot;
  }
  return {keys, slots};
}

void check_announced(bool is, int64_t row) {
  STD_TORCH_CHECK(is, "`rows` must have been announced and not planned, got ", row,
                  ", which is not, or twice");
}

void check_pending(const Tensor& rows, SlotMap& map) {
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) check_announced(row[i] >= 0, row[i]);
  SlotPlan result;
  for (SlotEntry* entry : entries_of(map, row, rows.numel(), result)) unmark(*entry);
  check_announced(result.unknown < 0, result.unknown);
}

void retract_rows_cpu(const Tensor& rows, const Tensor& entries, const Tensor& queue,
                      const Tensor& counters) {
  SlotMap map = row_map_view(entries, queue, counters);
  check_tensor(rows, "rows", ScalarType::Long, 1);
  check_device(rows, entries);
  check_apart(rows, "rows", entries, queue, counters);
  check_pending(rows, map);
  retract(map, rows.const_data_ptr<int64_t>(), rows.numel());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> plan_slots_cpu(
    const Tensor& rows, const Tensor& entries, const Tensor& queue, const Tensor& counters,
    const Tensor& slots, const Tensor& free, int64_t oldest, bool urgent, bool train) {
  SlotMap map = slot_map_view(entries, queue, counters, slots, free);
  check_tensor(rows, "rows", ScalarType::Long, 1);
  check_device(rows, entries);
  check_apart(rows, "rows", entries, queue, counters, slots, free);
  const int64_t size = rows.numel();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < size; ++i) check_announced(row[i] >= 0, row[i]);
  Tensor found = empty_cpu<1>({size}, aoti_torch_dtype_int32());
  const SlotPlan result = plan(map, row, size, static_cast<int32_t>(oldest), urgent, train,
                               found.mutable_data_ptr<int32_t>());
  check_announced(result.unknown < 0, result.unknown);
  const auto [fill_keys, fill_slots] = move_tensors(result.fill);
  const auto [spill_keys, spill_slots] = move_tensors(result.spill);
  return {found, fill_keys, fill_slots, spill_keys, spill_slots, result.shortage};
}

// Slots must be held as often as they are named: each hold is taken away, and given back.
void check_held(const Tensor& held, const SlotMap& map) {
  const int32_t* slot = held.const_data_ptr<int32_t>();
  int64_t count = 0;
  for (; count < held.numel(); ++count) {
    const int32_t at = slot[count];
    if (at < 0 || at >= map.num_slots || map.slots[at].state < kHold) break;
    map.slots[at].state -= kHold;
  }
  for (int64_t i = 0; i < count; ++i) map.slots[slot[i]].state += kHold;
  STD_TORCH_CHECK(count == held.numel(), "`held` must be slots that are held, got ", slot[count]);
}

// On the calling thread, unlike torch's indexing: it runs beside the training.
Tensor slots_of_occurrences_cpu(const Tensor& found, const Tensor& positions) {
  check_tensor(found, "found", ScalarType::Int, 1);
  check_tensor(positions, "positions", ScalarType::Int, 1);
  check_device(found, positions);
  const int64_t size = positions.numel();
  Tensor slots = empty_cpu<1>({size}, aoti_torch_dtype_int64());
  const int32_t* slot = found.const_data_ptr<int32_t>();
  const int32_t* position = positions.const_data_ptr<int32_t>();
  int64_t* out = slots.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < size; ++i) {
    STD_TORCH_CHECK(position[i] >= 0 && position[i] < found.numel(), "`positions` must be in [0, ",
                    found.numel(), "), got ", position[i]);
    out[i] = slot[position[i]];
  }
  return slots;
}

void release_slots_cpu(const Tensor& held, const Tensor& slots) {
  check_words(slots, "slots", kSlotWords);
  check_tensor(held, "held", ScalarType::Int, 1);
  check_device(held, slots);
  check_apart(held, "held", slots);
  SlotMap map{};
  map.slots = static_cast<Slot*>(slots.data_ptr());
  map.num_slots = slots.size(0);
  check_held(held, map);
  release(map, held.const_data_ptr<int32_t>(), held.numel());
}

void postpone_rows_cpu(const Tensor& rows, const Tensor& held, const Tensor& entries,
                       const Tensor& queue, const Tensor& counters, const Tensor& slots,
                       const Tensor& free) {
  SlotMap map = slot_map_view(entries, queue, counters, slots, free);
  check_tensor(rows, "rows", ScalarType::Long, 1);
  check_tensor(held, "held", ScalarType::Int, 1);
  check_device(rows, held, entries);
  check_apart(rows, "rows", entries, queue, counters, slots, free);
  check_apart(held, "held", entries, queue, counters, slots, free);
  STD_TORCH_CHECK(rows.numel() == held.numel(), "held must be as long as rows");
  check_held(held, map);
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int32_t* slot = held.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    STD_TORCH_CHECK(map.slots[slot[i]].key == row[i], "`rows` must lie in the slots, got ", row[i]);
  }
  postpone(map, row, slot, rows.numel());
}

void grow_slot_map_cpu(const Tensor& entries, const Tensor& queue, const Tensor& counters,
                       const Tensor& new_entries, const Tensor& new_queue,
                       const Tensor& new_counters) {
  const SlotMap from = row_map_view(entries, queue, counters);
  SlotMap to = row_map_view(new_entries, new_queue, new_counters);
  STD_TORCH_CHECK(to.capacity > from.capacity, "`state` must become larger");
  check_apart(new_entries, "new_entries", entries, queue, counters);
  check_apart(new_queue, "new_queue", entries, queue, counters);
  check_apart(new_counters, "new_counters", entries, queue, counters);
  move_entries(from, to);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("announce_rows", TORCH_BOX(&announce_rows_cpu));
  m.impl("plan_slots", TORCH_BOX(&plan_slots_cpu));
  m.impl("slots_of_occurrences", TORCH_BOX(&slots_of_occurrences_cpu));
  m.impl("retract_rows", TORCH_BOX(&retract_rows_cpu));
  m.impl("release_slots", TORCH_BOX(&release_slots_cpu));
  m.impl("postpone_rows", TORCH_BOX(&postpone_rows_cpu));
  m.impl("grow_slot_map", TORCH_BOX(&grow_slot_map_cpu));
}

}  // namespace torchrec_cafe
