// The protocol of torchrec_cafe/tables/scratchpad.py: one thread trains while another plans and
// moves rows. Every batch must see the values of a sequential execution; under the thread
// sanitizer, without a race.
#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#include "sketch.h"
#include "slot_state.h"

namespace {

using namespace torchrec_cafe;

constexpr int64_t kRows = 60;
constexpr int64_t kBatch = 8;
using Values = std::array<int64_t, 4>;

void pause(std::mt19937_64& random) {
  if (random() % 8 == 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 60));
  } else if (random() % 2 == 0) {
    std::this_thread::yield();
  }
}

struct Lookup {
  int32_t number;
  bool train;
  std::vector<int64_t> keys;
  std::vector<int64_t> rows;
  std::vector<int32_t> positions;
  std::vector<int32_t> held;
  bool ready = false;
  bool begun = false;
  bool released = false;
};

// What the two threads share, and the one that moves. Members have the names of `_Mover`.
class Mover {
 public:
  std::vector<Values> slots;
  std::vector<Values> store = std::vector<Values>(kRows);
  // With it no access to `slots` is a race, whatever the protocol allows.
  std::mutex big_lock;
  int64_t spills = 0, postponed = 0, urgent_plans = 0, shortages = 0;

  Mover(int64_t num_slots, int seed, bool locked)
      : slots(num_slots), state_(4 * kRows, num_slots), random_(seed), locked_(locked) {
    thread_ = std::thread([this] { run(); });
  }

  std::unique_lock<std::mutex> access() {
    return locked_ ? std::unique_lock(big_lock) : std::unique_lock<std::mutex>();
  }

  void submit(Lookup& lookup) {
    const std::lock_guard lock(mutex_);
    new_.push_back(&lookup);
    changed_.notify_all();
  }

  void wait(Lookup& lookup) {
    std::unique_lock lock(mutex_);
    if (!lookup.ready) {
      urgent_ = &lookup;
      changed_.notify_all();
      changed_.wait(lock, [&] { return lookup.ready; });
      urgent_ = nullptr;
    }
    lookup.begun = true;
  }

  void release(Lookup& lookup) {
    const std::lock_guard lock(mutex_);
    lookup.released = true;
    if (!lookup.ready) return;
    let_go(lookup);
    changed_.notify_all();
  }

  void flush() {
    std::unique_lock lock(mutex_);
    asked_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return !asked_; });
  }

  void close() {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

 private:
  enum class Step { kNothing, kAnswer, kAnnounce, kPlanUrgent, kPlanNext };

  // --- under the mutex ---

  void let_go(Lookup& lookup) {
    std::erase(planned_, &lookup);
    released_.push_back(lookup.held);
    may_plan_ = true;
  }

  Step next_step() const {
    if (asked_) return Step::kAnswer;
    if (!new_.empty()) return Step::kAnnounce;
    if (std::find(waiting_.begin(), waiting_.end(), urgent_) != waiting_.end()) {
      return Step::kPlanUrgent;
    }
    return !waiting_.empty() && may_plan_ ? Step::kPlanNext : Step::kNothing;
  }

  // --- the thread ---

  void run() {
    while (true) {
      Step step;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return closed_ || next_step() != Step::kNothing; });
        if (closed_) return;
        step = next_step();
      }
      pause(random_);
      if (step == Step::kAnswer) write_back();
      if (step == Step::kAnnounce) announce_next();
      if (step == Step::kPlanUrgent) plan_urgent();
      if (step == Step::kPlanNext) plan_next();
    }
  }

  void announce_next() {
    Lookup* lookup;
    {
      const std::lock_guard lock(mutex_);
      lookup = new_.front();
    }
    const auto size = static_cast<int64_t>(lookup->keys.size());
    CHECK(state_.has_room(size));
    lookup->rows.resize(lookup->keys.size());
    lookup->positions.resize(lookup->keys.size());
    lookup->rows.resize(announce(state_.map, lookup->keys.data(), size, lookup->number,
                                 lookup->rows.data(), lookup->positions.data()));
    const std::lock_guard lock(mutex_);
    new_.pop_front();
    waiting_.push_back(lookup);
    may_plan_ = true;
  }

  void plan_next() {
    Lookup* lookup;
    {
      const std::lock_guard lock(mutex_);
      lookup = waiting_.front();
      may_plan_ = false;
    }
    shortages += plan_one(*lookup, false) > 0;
  }

  void plan_urgent() {
    Lookup* lookup;
    {
      const std::lock_guard lock(mutex_);
      lookup = urgent_;
    }
    int64_t missing = plan_one(*lookup, false);
    if (missing > 0) {
      ++urgent_plans;
      missing = plan_one(*lookup, true);
    }
    while (missing > 0) {
      Lookup* other = nullptr;
      {
        const std::lock_guard lock(mutex_);
        for (Lookup* planned : planned_) other = planned->begun ? other : planned;
      }
      CHECK(other != nullptr);  // a batch fits alone
      postpone_one(*other);
      missing = plan_one(*lookup, true);
    }
  }

  void postpone_one(Lookup& lookup) {
    ++postponed;
    postpone(state_.map, lookup.rows.data(), lookup.held.data(),
             static_cast<int64_t>(lookup.rows.size()));
    const std::lock_guard lock(mutex_);
    std::erase(planned_, &lookup);
    lookup.ready = false;
    const auto later = [&](const Lookup* other) { return other->number > lookup.number; };
    waiting_.insert(std::find_if(waiting_.begin(), waiting_.end(), later), &lookup);
  }

  int64_t plan_one(Lookup& lookup, bool urgent) {
    std::vector<std::vector<int32_t>> released;
    int32_t oldest = INT32_MAX;
    {
      const std::lock_guard lock(mutex_);
      released.swap(released_);
      for (const Lookup* other : waiting_) oldest = std::min(oldest, other->number);
      for (const Lookup* other : planned_) oldest = std::min(oldest, other->number);
    }
    for (const auto& held : released) {
      torchrec_cafe::release(state_.map, held.data(), static_cast<int64_t>(held.size()));
    }
    std::vector<int32_t> found(lookup.rows.size());
    const SlotPlan result =
        plan(state_.map, lookup.rows.data(), static_cast<int64_t>(lookup.rows.size()), oldest,
             urgent, lookup.train, found.data());
    if (result.shortage > 0) return result.shortage;
    move(result);
    const std::lock_guard lock(mutex_);
    lookup.held = std::move(found);
    lookup.ready = true;
    std::erase(waiting_, &lookup);
    planned_.push_back(&lookup);
    if (lookup.released) let_go(lookup);
    changed_.notify_all();
    return 0;
  }

  void move(const SlotPlan& result) {
    for (const SlotMove& spill : result.spill) {
      pause(random_);
      const auto lock = access();
      store[spill.key] = slots[spill.slot];
    }
    for (const SlotMove& fill : result.fill) {
      pause(random_);
      const auto lock = access();
      slots[fill.slot] = store[fill.key];
    }
    spills += static_cast<int64_t>(result.spill.size());
  }

  void write_back() {
    for (size_t number = 0; number < slots.size(); ++number) {
      Slot& slot = state_.slots[number];
      if (!(slot.state & kDirty)) continue;
      const auto lock = access();
      store[slot.key] = slots[number];
      if (slot.state < kHold) slot.state &= ~kDirty;
    }
    const std::lock_guard lock(mutex_);
    asked_ = false;
    changed_.notify_all();
  }

  SlotState state_;  // the thread's own
  std::mt19937_64 random_;
  bool locked_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // Under the mutex.
  std::deque<Lookup*> new_;
  std::vector<Lookup*> waiting_, planned_;
  std::vector<std::vector<int32_t>> released_;
  Lookup* urgent_ = nullptr;
  bool may_plan_ = true;
  bool asked_ = false;
  bool closed_ = false;
  std::thread thread_;
};

struct Trial {
  int64_t num_slots;
  int64_t depth;
  int seed;
  bool early_release = false;  // the fault: slots are released before they are updated
};

// Trains, and counts what differs from a sequential execution.
class Trainer {
 public:
  int64_t wrong = 0;
  Mover mover;

  explicit Trainer(const Trial& trial)
      : mover(trial.num_slots, trial.seed, trial.early_release),
        trial_(trial),
        random_(trial.seed + 1000) {}

  void run(int num_batches) {
    for (int batch = 0; batch < num_batches; ++batch) {
      while (static_cast<int64_t>(ahead_.size()) <= trial_.depth) submit();
      // Now and then another batch comes first: an evaluation, say.
      const bool in_turn = trial_.early_release || random_() % 6 > 0;
      Lookup& lookup = in_turn ? *ahead_.front() : *ahead_.back();
      in_turn ? ahead_.pop_front() : ahead_.pop_back();
      mover.wait(lookup);
      train(lookup);
      if (random_() % 40 == 0) mover.flush();
    }
    for (Lookup* lookup : ahead_) mover.release(*lookup);
    mover.flush();
    mover.close();
    for (int64_t row = 0; row < kRows; ++row) wrong += mover.store[row] != model_[row];
  }

 private:
  void submit() {
    auto lookup = std::make_unique<Lookup>();
    lookup->number = static_cast<int32_t>(lookups_.size());
    lookup->train = random_() % 4 > 0;
    lookup->keys.resize(1 + random_() % kBatch);
    for (int64_t& key : lookup->keys) {
      key = static_cast<int64_t>(random_() % (random_() % 2 == 0 ? kRows : 10));
    }
    mover.submit(*lookup);
    if (random_() % 12 == 0 && !trial_.early_release) {
      mover.release(*lookup);  // it is never looked up
    } else {
      ahead_.push_back(lookup.get());
    }
    lookups_.push_back(std::move(lookup));
  }

  void train(Lookup& lookup) {
    for (size_t i = 0; i < lookup.keys.size(); ++i) {
      const auto lock = mover.access();
      wrong += mover.slots[lookup.held[lookup.positions[i]]] != model_[lookup.keys[i]];
    }
    const std::vector<int32_t> held = lookup.held;
    if (trial_.early_release) {
      mover.release(lookup);
      mover.wait(*ahead_.front());
    }
    pause(random_);
    for (size_t i = 0; lookup.train && i < lookup.keys.size(); ++i) {
      const auto lock = mover.access();
      add(mover.slots[held[lookup.positions[i]]], lookup.number);
      add(model_[lookup.keys[i]], lookup.number);
    }
    if (!trial_.early_release) mover.release(lookup);
  }

  // The order of updates matters, as it does for an optimizer.
  static void add(Values& values, int32_t number) {
    for (int64_t& value : values) value = (value * 31 + number + 1) % 1'000'003;
  }

  Trial trial_;
  std::mt19937_64 random_;
  std::vector<Values> model_ = std::vector<Values>(kRows);
  std::deque<Lookup*> ahead_;
  std::vector<std::unique_ptr<Lookup>> lookups_;
};

void test_every_batch_sees_the_values_of_a_sequential_execution() {
  int64_t spills = 0, postponed = 0, urgent_plans = 0, shortages = 0;
  const auto all_seen = [&] {
    return spills > 0 && postponed > 0 && urgent_plans > 0 && shortages > 0;
  };
  // On a busy machine the threads may take turns such that one of these never happens.
  for (int64_t round = 0; round < 20 && !all_seen(); ++round) {
    for (int64_t depth = 1; depth <= 8; ++depth) {
      for (const int64_t num_slots : {kBatch, kBatch * (depth + 2) / 2, kBatch * (depth + 1)}) {
        const int64_t seed = 10'000 * round + 100 * depth + num_slots;
        Trainer trainer({num_slots, depth, static_cast<int>(seed)});
        trainer.run(120);
        CHECK(trainer.wrong == 0);
        spills += trainer.mover.spills;
        postponed += trainer.mover.postponed;
        urgent_plans += trainer.mover.urgent_plans;
        shortages += trainer.mover.shortages;
      }
    }
  }
  CHECK(all_seen());
}

void test_slots_that_are_released_too_early_are_found_out() {
  for (const int64_t depth : {1, 4, 8}) {
    Trainer trainer({kBatch, depth, static_cast<int>(depth), true});
    trainer.run(60);
    CHECK(trainer.wrong > 0);
  }
}

}  // namespace

int main() {
  test_every_batch_sees_the_values_of_a_sequential_execution();
  test_slots_that_are_released_too_early_are_found_out();
  std::puts("ok");
  return 0;
}
