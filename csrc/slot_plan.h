// Announcing, planning and releasing batches of a scratchpad. Torch-free; see slot_map.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "slot_map.h"

namespace torchrec_cafe {

// Entries are looked up in the order of the batch, far apart in memory: asked for ahead of time.
constexpr int64_t kSlotPrefetch = 12;

inline void prefetch_entry(const SlotMap& map, const int64_t* keys, int64_t at, int64_t size) {
  if (at + kSlotPrefetch < size) {
    __builtin_prefetch(map.entries + map.home(keys[at + kSlotPrefetch]), 1);
  }
}

// Notes the rows that a batch will use. Gives each distinct row a position, in the order of their
// first occurrences, and each occurrence the position of its row. The map must have room for all.
// Returns how many distinct rows there are.
inline int64_t announce(SlotMap& map, const int64_t* keys, int64_t size, int32_t number,
                        int64_t* distinct, int32_t* positions) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    prefetch_entry(map, keys, i, size);
    SlotEntry& entry = *map.find(keys[i]);
    if (entry.key == kNoKey) {
      entry.key = keys[i];
      ++map.counters[kUsedEntries];
    }
    if (entry.last != number) {
      note_use(entry, number);
      entry.position = static_cast<int32_t>(count);
      distinct[count++] = keys[i];
      map.push_use(keys[i], number);
    }
    positions[i] = entry.position;
  }
  return count;
}

// A row and its slot.
struct SlotMove {
  int64_t key;
  int32_t slot;
};

// What planning a batch leads to.
struct SlotPlan {
  std::vector<SlotMove> fill;   // rows that have to be brought in
  std::vector<SlotMove> spill;  // rows that have changed and lose their slot: written back before
  int64_t shortage = 0;         // slots that are missing; if any, nothing has changed
  int64_t unknown = -1;         // a row that is not announced; if any, nothing has changed
};

// A slot that may be given away, and when its row was and will be used.
struct SlotCandidate {
  int32_t slot;
  int32_t next;
  int32_t last;

  // The one whose row is needed later leaves first; of rows that nobody needs, the oldest.
  bool operator<(const SlotCandidate& other) const {
    if (next != other.next) return next > other.next;
    return last != other.last ? last < other.last : slot < other.slot;
  }
};

// The least recently used slots of rows that no batch needs which is not released.
inline void pick_unused(SlotMap& map, int64_t wanted, int32_t oldest,
                        std::vector<int32_t>& picked) {
  int64_t& head = map.counters[kQueueHead];
  int64_t at = head;
  for (; at < map.counters[kQueueTail] && static_cast<int64_t>(picked.size()) < wanted; ++at) {
    const RowUse use = map.queue[at % map.capacity];
    if (use.last >= oldest) break;
    const int64_t later = at + kSlotPrefetch;
    if (later < map.counters[kQueueTail]) {
      __builtin_prefetch(map.entries + map.home(map.queue[later % map.capacity].key));
    }
    const SlotEntry& entry = *map.find(use.key);
    if (entry.key != use.key || entry.last != use.last) continue;
    // A row that is in use may have no slot: it must not be touched if `oldest` is wrong.
    if (entry.pending > 0 || entry.slot == kNoSlot) break;
    if (map.slots[entry.slot].state > kDirty) break;
    map.slots[entry.slot].state |= kPicked;
    picked.push_back(entry.slot);
  }
  if (static_cast<int64_t>(picked.size()) == wanted) head = at;
}

// Of the other slots that no planned batch holds, those whose rows are needed the latest.
inline void pick_needed_late(SlotMap& map, int64_t wanted, std::vector<int32_t>& picked) {
  std::vector<SlotCandidate> candidates;
  for (int64_t number = 0; number < map.num_slots; ++number) {
    const Slot& slot = map.slots[number];
    if (slot.key == kNoKey || slot.state > kDirty) continue;
    const SlotEntry& entry = *map.find(slot.key);
    candidates.push_back({static_cast<int32_t>(number), next_use(entry), entry.last});
  }
  const int64_t missing = wanted - static_cast<int64_t>(picked.size());
  const auto chosen = std::min<int64_t>(missing, static_cast<int64_t>(candidates.size()));
  std::partial_sort(candidates.begin(), candidates.begin() + chosen, candidates.end());
  for (int64_t i = 0; i < chosen; ++i) {
    map.slots[candidates[i].slot].state |= kPicked;
    picked.push_back(candidates[i].slot);
  }
}

// Takes a picked slot from its row.
inline void vacate(SlotMap& map, int32_t number, SlotPlan& plan) {
  Slot& slot = map.slots[number];
  SlotEntry& entry = *map.find(slot.key);
  if (slot.state & kDirty) plan.spill.push_back({slot.key, number});
  if (entry.pending == 0) {
    map.erase(&entry);
  } else {
    entry.slot = kNoSlot;
  }
  slot = Slot{};
  map.free[map.counters[kFreeSlots]++] = number;
}

// Takes all picked slots from their rows.
inline void vacate_all(SlotMap& map, const std::vector<int32_t>& picked, SlotPlan& plan) {
  const auto size = static_cast<int64_t>(picked.size());
  for (int64_t i = 0; i < size; ++i) {
    if (i + 2 * kSlotPrefetch < size) {
      __builtin_prefetch(map.slots + picked[i + 2 * kSlotPrefetch], 1);
    }
    if (i + kSlotPrefetch < size) {
      const int64_t key = map.slots[picked[i + kSlotPrefetch]].key;
      __builtin_prefetch(map.entries + map.home(key), 1);
    }
    vacate(map, picked[i], plan);
  }
}

// A row that a batch names twice is found by a mark, which is taken off again.
inline void mark(SlotEntry& entry) { entry.position = ~entry.position; }
inline void unmark(SlotEntry& entry) {
  if (entry.position < 0) mark(entry);
}

// The entries of a batch's rows, marked. Says in `plan` if one of them is not announced, or named
// twice.
inline std::vector<SlotEntry*> entries_of(SlotMap& map, const int64_t* distinct, int64_t size,
                                          SlotPlan& plan) {
  std::vector<SlotEntry*> found(size);
  for (int64_t i = 0; i < size; ++i) {
    prefetch_entry(map, distinct, i, size);
    SlotEntry* entry = map.find(distinct[i]);
    const bool known = entry->key == distinct[i] && entry->pending > 0 && entry->position >= 0;
    if (!known) plan.unknown = distinct[i];
    if (known) mark(*entry);
    if (entry->slot != kNoSlot) __builtin_prefetch(map.slots + entry->slot, 1);
    found[i] = entry;
  }
  return found;
}

// Holds the slots of the rows that have one. Returns the positions of the others.
inline std::vector<int64_t> hold_hits(SlotMap& map, const std::vector<SlotEntry*>& entries,
                                      int32_t* slots) {
  std::vector<int64_t> misses;
  for (size_t i = 0; i < entries.size(); ++i) {
    slots[i] = entries[i]->slot;
    --entries[i]->pending;
    unmark(*entries[i]);
    if (slots[i] == kNoSlot) {
      misses.push_back(static_cast<int64_t>(i));
    } else {
      map.slots[slots[i]].state += kHold;
    }
  }
  return misses;
}

inline void release(SlotMap& map, const int32_t* slots, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (slots[i] != kNoSlot) map.slots[slots[i]].state -= kHold;
  }
}

// Gives each row of an announced batch a slot and holds it.
//
// `oldest` is at most the number of the oldest batch that is announced or planned and not released.
// Unless `urgent`, rows that an announced batch needs keep their slots. If slots are missing, says
// how many, and changes nothing.
inline SlotPlan plan(SlotMap& map, const int64_t* distinct, int64_t size, int32_t oldest,
                     bool urgent, bool train, int32_t* slots) {
  SlotPlan result;
  const std::vector<SlotEntry*> entries = entries_of(map, distinct, size, result);
  if (result.unknown >= 0) {
    for (SlotEntry* entry : entries) unmark(*entry);
    return result;
  }
  const std::vector<int64_t> misses = hold_hits(map, entries, slots);
  const int64_t wanted = static_cast<int64_t>(misses.size()) - map.counters[kFreeSlots];
  std::vector<int32_t> picked;
  if (wanted > 0) pick_unused(map, wanted, oldest, picked);
  if (urgent && static_cast<int64_t>(picked.size()) < wanted) {
    pick_needed_late(map, wanted, picked);
  }
  if (static_cast<int64_t>(picked.size()) < wanted) {
    result.shortage = wanted - static_cast<int64_t>(picked.size());
    for (const int32_t slot : picked) map.slots[slot].state &= ~kPicked;
    for (SlotEntry* entry : entries) ++entry->pending;
    release(map, slots, size);
    return result;
  }
  vacate_all(map, picked, result);  // entries may have moved since
  result.fill.reserve(misses.size());
  for (size_t i = 0; i < misses.size(); ++i) {
    if (i + kSlotPrefetch < misses.size()) {
      __builtin_prefetch(map.entries + map.home(distinct[misses[i + kSlotPrefetch]]), 1);
    }
    const int64_t row = distinct[misses[i]];
    const int32_t slot = map.free[--map.counters[kFreeSlots]];
    map.find(row)->slot = slots[misses[i]] = slot;
    map.slots[slot] = Slot{row, kHold};
    result.fill.push_back({row, slot});
  }
  for (int64_t i = 0; train && i < size; ++i) map.slots[slots[i]].state |= kDirty;
  return result;
}

// Takes back the plan of a batch that has not begun: it lets go of its slots and is planned later.
inline void postpone(SlotMap& map, const int64_t* distinct, const int32_t* slots, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    prefetch_entry(map, distinct, i, size);
    ++map.find(distinct[i])->pending;
  }
  release(map, slots, size);
}

// Forgets an announced batch that will not be planned.
inline void retract(SlotMap& map, const int64_t* distinct, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    SlotEntry& entry = *map.find(distinct[i]);
    --entry.pending;
    if (entry.pending == 0 && entry.slot == kNoSlot) map.erase(&entry);
  }
}

// Moves everything into a map of a larger capacity, whose entries are empty.
inline void move_entries(const SlotMap& from, SlotMap& to) {
  for (int64_t at = 0; at < from.capacity; ++at) {
    if (from.entries[at].key == kNoKey) continue;
    *to.find(from.entries[at].key) = from.entries[at];
    ++to.counters[kUsedEntries];
  }
  for (int64_t at = from.counters[kQueueHead]; at < from.counters[kQueueTail]; ++at) {
    const RowUse use = from.queue[at % from.capacity];
    to.push_use(use.key, static_cast<int32_t>(use.last));
  }
}

}  // namespace torchrec_cafe
