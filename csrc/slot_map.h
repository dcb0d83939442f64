// Which row of a large table lies in which slot of a scratchpad, and which slots may be given away.
// Torch-free.
//
// Batches are announced in the order of their arrival, with a number that grows, and planned later:
// a batch that is planned holds its slots until it is released, so that no row leaves its slot
// between the moment that it is filled and the end of the batch's own update. The rows of batches
// that are announced but not planned may be anywhere; their next use decides who has to leave.
#pragma once

#include <cstdint>

#include "hash.h"

namespace torchrec_cafe {

constexpr int64_t kNoKey = -1;
constexpr int32_t kNoSlot = -1;
constexpr int32_t kNeverUsed = -1;
// Batches back that the uses of a row are remembered for.
constexpr int kUseWindow = 16;

// What is known of a row: one that is in a slot, or that an announced batch needs.
struct SlotEntry {
  int64_t key = kNoKey;       // the row
  int32_t slot = kNoSlot;     // where it lies
  int32_t position = 0;       // among the rows of the batch that was announced last
  int32_t last = kNeverUsed;  // the last batch that was announced with it
  uint16_t uses = 0;          // bit i: batch last - i uses it
  uint16_t pending = 0;       // announced batches that use it and are not planned
};
static_assert(sizeof(SlotEntry) == 24);
constexpr int64_t kSlotEntryWords = sizeof(SlotEntry) / 8;

// A slot of the scratchpad.
struct Slot {
  int64_t key = kNoKey;  // the row that lies there
  int64_t state = 0;     // kDirty, kPicked, and kHold times the planned batches that use it
};
static_assert(sizeof(Slot) == 16);
constexpr int64_t kSlotWords = sizeof(Slot) / 8;
constexpr int64_t kDirty = 1;   // it differs from the table
constexpr int64_t kPicked = 2;  // it is about to be given away
constexpr int64_t kHold = 4;

// A use of a row. It is out of date if the row's last use is another.
struct RowUse {
  int64_t key;
  int64_t last;
};
constexpr int64_t kRowUseWords = sizeof(RowUse) / 8;

// Words of the map's counters.
enum SlotCounter : int64_t { kUsedEntries, kFreeSlots, kQueueHead, kQueueTail, kNumSlotCounters };

// Views of the map's state.
struct SlotMap {
  SlotEntry* entries;  // open addressing, linear probing
  int64_t capacity;    // of entries, < 2^32
  Slot* slots;
  int32_t* free;  // [num_slots], the first counters[kFreeSlots] are free
  int64_t num_slots;
  RowUse* queue;  // a ring of `capacity` uses, in the order of their batches
  int64_t* counters;

  CAFE_HOST_DEVICE int64_t home(int64_t key) const {
    return reduce_hash(hash64(static_cast<uint64_t>(key)), static_cast<uint32_t>(capacity));
  }

  CAFE_HOST_DEVICE int64_t next(int64_t at) const { return at + 1 == capacity ? 0 : at + 1; }

  // The entry of a key, or the empty one where it belongs. There always is an empty one.
  CAFE_HOST_DEVICE SlotEntry* find(int64_t key) const {
    int64_t at = home(key);
    while (entries[at].key != key && entries[at].key != kNoKey) at = next(at);
    return entries + at;
  }

  // Removes an entry and closes the gap: later entries of its run move up if that brings them no
  // nearer than their home.
  CAFE_HOST_DEVICE void erase(SlotEntry* entry) {
    int64_t gap = entry - entries;
    for (int64_t at = next(gap); entries[at].key != kNoKey; at = next(at)) {
      const int64_t from_home = distance(home(entries[at].key), at);
      if (from_home >= distance(gap, at)) {
        entries[gap] = entries[at];
        gap = at;
      }
    }
    entries[gap] = SlotEntry{};
    --counters[kUsedEntries];
  }

  CAFE_HOST_DEVICE int64_t distance(int64_t from, int64_t to) const {
    return to >= from ? to - from : to + capacity - from;
  }

  // Notes a use at the end of the queue. Uses that are out of date make room: there are fewer rows
  // than places.
  CAFE_HOST_DEVICE void push_use(int64_t key, int32_t last) {
    if (counters[kQueueTail] - counters[kQueueHead] == capacity) drop_old_uses();
    queue[counters[kQueueTail]++ % capacity] = RowUse{key, last};
  }

  CAFE_HOST_DEVICE void drop_old_uses() {
    int64_t kept = counters[kQueueHead];
    for (int64_t at = kept; at < counters[kQueueTail]; ++at) {
      const RowUse use = queue[at % capacity];
      const SlotEntry& entry = *find(use.key);
      if (entry.key == use.key && entry.last == use.last) queue[kept++ % capacity] = use;
    }
    counters[kQueueTail] = kept;
  }
};

// A row's entry learns of a batch that uses it. The number of the batch is above all before it.
CAFE_HOST_DEVICE inline void note_use(SlotEntry& entry, int32_t number) {
  const int32_t since = entry.last == kNeverUsed ? kUseWindow : number - entry.last;
  const uint32_t uses = since < kUseWindow ? static_cast<uint32_t>(entry.uses) << since : 0;
  entry.uses = static_cast<uint16_t>(uses | 1);
  entry.last = number;
  ++entry.pending;
}

// The next batch that will be planned with this row, or INT32_MAX. Batches are planned in their
// order, so it is the earliest of the last `pending` uses.
CAFE_HOST_DEVICE inline int32_t next_use(const SlotEntry& entry) {
  if (entry.pending == 0) return INT32_MAX;
  int pending = entry.pending;
  for (int i = 0; i < kUseWindow; ++i) {
    pending -= entry.uses >> i & 1;
    if (pending == 0) return entry.last - i;
  }
  return entry.last - kUseWindow;
}

}  // namespace torchrec_cafe
