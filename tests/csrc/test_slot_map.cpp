// The slot map against a std::map: what is known of each row, and who may lose a slot.
#include <map>
#include <random>

#include "sketch.h"
#include "slot_state.h"

namespace {

using namespace torchrec_cafe;

constexpr int64_t kRows = 24;

struct Batch {
  int32_t number;
  std::vector<int64_t> rows;
  std::vector<int32_t> held;
};

// What has happened, so that nothing is left out.
struct Seen {
  int64_t wrapped = 0, closed_gaps = 0, shortages = 0, needed_left = 0, compacted = 0;
};

struct Row {
  int32_t slot = kNoSlot;
  int32_t last = 0;
  int pending = 0;
  int holds = 0;
  bool dirty = false;
};

// A slot map, and what it must know.
struct Model {
  SlotState state;
  std::map<int64_t, Row> rows;
  std::vector<Batch> waiting, planned;
  std::mt19937_64 random;
  int32_t number = 0;
  Seen& seen;

  Model(int64_t capacity, int64_t num_slots, int seed, Seen& what)
      : state(capacity, num_slots), random(seed), seen(what) {}

  SlotMap& map() { return state.map; }

  void announce_some() {
    std::vector<int64_t> keys(random() % 4);
    if (!state.has_room(static_cast<int64_t>(keys.size()))) return;
    for (int64_t& key : keys) key = static_cast<int64_t>(random() % kRows);
    number += 1 + static_cast<int32_t>(random() % 3);
    Batch batch{number, std::vector<int64_t>(keys.size()), {}};
    std::vector<int32_t> positions(keys.size());
    const auto size = static_cast<int64_t>(keys.size());
    const int64_t tail = map().counters[kQueueTail];
    batch.rows.resize(
        announce(map(), keys.data(), size, number, batch.rows.data(), positions.data()));
    seen.compacted += map().counters[kQueueTail] < tail;
    for (size_t i = 0; i < keys.size(); ++i) CHECK(batch.rows[positions[i]] == keys[i]);
    for (const int64_t key : batch.rows) {
      rows[key].last = number;
      ++rows[key].pending;
    }
    waiting.push_back(std::move(batch));
  }

  // Slots that a batch can have: free ones, its own, and those of rows that may leave.
  int64_t available(const Batch& batch, int32_t oldest, bool urgent) {
    int64_t count = map().num_slots;
    for (const auto& [key, row] : rows) {
      const bool own = std::find(batch.rows.begin(), batch.rows.end(), key) != batch.rows.end();
      const bool leaves = urgent ? row.holds == 0 : row.last < oldest;
      if (row.slot != kNoSlot && !own && !leaves) --count;
    }
    return count;
  }

  void plan_one() {
    if (waiting.empty()) return;
    const size_t index = random() % 4 > 0 ? 0 : random() % waiting.size();
    Batch batch = waiting[index];
    int32_t oldest = waiting[0].number;
    for (const Batch& other : planned) oldest = std::min(oldest, other.number);
    const bool urgent = random() % 3 == 0, train = random() % 2 == 0;
    const auto size = static_cast<int64_t>(batch.rows.size());
    const int64_t missing = std::max<int64_t>(0, size - available(batch, oldest, urgent));
    batch.held.resize(batch.rows.size());
    const SlotPlan result =
        plan(map(), batch.rows.data(), size, oldest, urgent, train, batch.held.data());
    CHECK(result.shortage == missing);
    seen.shortages += missing > 0;
    if (missing > 0) return;
    check_moves(result, train, batch);
    waiting.erase(waiting.begin() + static_cast<int64_t>(index));
    planned.push_back(std::move(batch));
  }

  void check_moves(const SlotPlan& result, bool train, const Batch& batch) {
    size_t spills = 0;
    for (auto at = rows.begin(); at != rows.end();) {
      Row& row = at->second;
      const bool left = row.slot != kNoSlot && map().slots[row.slot].key != at->first;
      if (left) {
        CHECK(row.holds == 0);
        const auto is_it = [&](const SlotMove& move) {
          return move.key == at->first && move.slot == row.slot;
        };
        CHECK(row.dirty == std::any_of(result.spill.begin(), result.spill.end(), is_it));
        spills += row.dirty;
        seen.needed_left += row.pending > 0;
        row.slot = kNoSlot;
        row.dirty = false;
      }
      at = left && row.pending == 0 ? rows.erase(at) : std::next(at);
    }
    CHECK(spills == result.spill.size());
    for (const SlotMove& move : result.fill) {
      CHECK(rows.at(move.key).slot == kNoSlot);
      rows.at(move.key).slot = move.slot;
    }
    for (size_t i = 0; i < batch.rows.size(); ++i) {
      Row& row = rows.at(batch.rows[i]);
      CHECK(row.slot == batch.held[i]);
      --row.pending;
      ++row.holds;
      row.dirty |= train;
    }
  }

  void retract_one() {
    if (waiting.empty()) return;
    const Batch batch = waiting.back();
    waiting.pop_back();
    const int64_t used = map().counters[kUsedEntries];
    retract(map(), batch.rows.data(), static_cast<int64_t>(batch.rows.size()));
    seen.closed_gaps += map().counters[kUsedEntries] < used;
    for (const int64_t key : batch.rows) {
      Row& row = rows.at(key);
      if (--row.pending == 0 && row.slot == kNoSlot) rows.erase(key);
    }
  }

  void let_go(bool again) {
    if (planned.empty()) return;
    const Batch batch = again ? planned.back() : planned.front();
    planned.erase(again ? planned.end() - 1 : planned.begin());
    const auto size = static_cast<int64_t>(batch.rows.size());
    if (again) {
      postpone(map(), batch.rows.data(), batch.held.data(), size);
      const auto later = [&](const Batch& other) { return other.number > batch.number; };
      waiting.insert(std::find_if(waiting.begin(), waiting.end(), later), batch);
    } else {
      release(map(), batch.held.data(), size);
    }
    for (const int64_t key : batch.rows) {
      --rows.at(key).holds;
      rows.at(key).pending += again;
    }
  }

  void check() {
    int64_t in_slots = 0;
    for (int64_t key = 0; key < kRows; ++key) {
      const SlotEntry& entry = *map().find(key);
      const auto found = rows.find(key);
      CHECK((entry.key == key) == (found != rows.end()));
      if (found == rows.end()) continue;
      const Row& row = found->second;
      CHECK(entry.slot == row.slot && entry.last == row.last && entry.pending == row.pending);
      seen.wrapped += &entry - map().entries < map().home(key);
      if (row.slot == kNoSlot) continue;
      ++in_slots;
      CHECK(map().slots[row.slot].key == key);
      CHECK(map().slots[row.slot].state == row.holds * kHold + (row.dirty ? kDirty : 0));
    }
    CHECK(map().counters[kUsedEntries] == static_cast<int64_t>(rows.size()));
    CHECK(map().counters[kFreeSlots] + in_slots == map().num_slots);
  }

  void step() {
    switch (random() % 8) {
      case 0:
      case 1:
        return announce_some();
      case 2:
        return let_go(true);
      case 3:
        return retract_one();
      case 4:
      case 5:
        return let_go(false);
      default:
        return plan_one();
    }
  }
};

void test_a_tiny_map_knows_what_a_map_knows() {
  Seen seen;
  for (int seed = 0; seed < 60; ++seed) {
    Model model(8 + seed % 9, 2 + seed % 5, seed, seen);
    for (int step = 0; step < 400; ++step) {
      model.step();
      model.check();
    }
  }
  CHECK(seen.wrapped > 0 && seen.closed_gaps > 0 && seen.shortages > 0);
  CHECK(seen.needed_left > 0 && seen.compacted > 0);
}

void test_a_map_that_moves_keeps_its_order() {
  SlotState small(16, 4), large(37, 4);
  const std::vector<int64_t> first{1, 2, 3, 4}, last{5, 6};
  std::vector<int64_t> rows(4);
  std::vector<int32_t> positions(4), held(4);
  announce(small.map, first.data(), 4, 0, rows.data(), positions.data());
  plan(small.map, rows.data(), 4, 0, false, true, held.data());
  release(small.map, held.data(), 4);
  move_entries(small.map, large.map);
  large.map.slots = small.map.slots;
  large.map.free = small.map.free;
  large.counters[kFreeSlots] = small.counters[kFreeSlots];
  announce(large.map, last.data(), 2, 1, rows.data(), positions.data());
  const SlotPlan result = plan(large.map, rows.data(), 2, 1, false, false, held.data());
  CHECK(result.shortage == 0 && result.spill.size() == 2);
  CHECK(result.spill[0].key == 1 && result.spill[1].key == 2);
}

}  // namespace

int main() {
  test_a_tiny_map_knows_what_a_map_knows();
  test_a_map_that_moves_keeps_its_order();
  std::puts("ok");
  return 0;
}
