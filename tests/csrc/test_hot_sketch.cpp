// Properties of the torch-free algorithm: long random streams, every hot row with one owner, the
// same bits from every instruction set, no write out of bounds.
#include <cmath>
#include <limits>
#include <random>

#include "row_map.h"
#include "sketch.h"

namespace {

using namespace torchrec_cafe;

// What `rebalance` says, for shard 0.
struct Outcome {
  std::vector<int8_t> actions;
  std::vector<int64_t> new_keys;
  int64_t promoted = 0;
  int64_t demoted = 0;

  Outcome(const Kernels& kernels, Sketch& sketch, float min_score, float hysteresis)
      : actions(sketch.num_hot_rows), new_keys(sketch.num_hot_rows) {
    kernels.rebalance(sketch.shard(0), min_score, hysteresis, 0, actions.data(), new_keys.data(),
                      &promoted, &demoted);
  }
};

void test_mixing_is_a_bijection() {
  for (int64_t n = 1; n < 600; ++n) {
    std::vector<bool> seen(n, false);
    for (int64_t id = 0; id < n; ++id) {
      const int64_t mixed = mix_id(id, n);
      CHECK(mixed >= 0 && mixed < n && !seen[mixed]);
      seen[mixed] = true;
    }
  }
  const int64_t large = (int64_t{1} << 47) - 1;
  CHECK(mix_id(large - 1, large) < large);
}

// Whole vectors and rests, ids in range and not.
void test_mixing_of_many(const Kernels& kernels) {
  std::mt19937_64 random(3);
  for (const int64_t n : {1, 2, 3, 64, 65, 1000, 1 << 20, (1 << 20) + 1}) {
    for (const int64_t size : {0, 1, 63, 64, 65, 500}) {
      std::vector<int64_t> ids(size), mixed(size);
      int64_t wrong = 0;
      for (int64_t& id : ids) {
        id = static_cast<int64_t>(random() % (n + 2)) - 1;
        wrong += id < 0 || id >= n;
      }
      CHECK(kernels.mix(ids.data(), size, n, mixed.data()) == wrong);
      for (int64_t i = 0; i < size; ++i) {
        CHECK(mixed[i] == mix_id(ids[i] < 0 || ids[i] >= n ? 0 : ids[i], n));
      }
    }
  }
}

// Follows one bucket slot by slot: what a sentence of bucket.h says, each on its own.
void test_random_stream(const Kernels& kernels) {
  std::mt19937_64 random(0);
  for (const int64_t rows : {1, 3, 16, 64}) {
    Sketch sketch(1, 16, rows);
    double mass = 0.0;
    for (int step = 0; step < 20000; ++step) {
      const auto key = static_cast<int64_t>(random() % 500);
      const float score = static_cast<float>(random() % 4);
      const bool held = sketch.holds(key);
      const Insertion outcome = insert(sketch.bucket(key), key, score);
      const double change = sketch.mass() - mass;
      mass += change;
      if (held) CHECK(outcome == kAbsorbed && change == score);
      if (outcome == kAbsorbed) CHECK(change == (sketch.holds(key) ? score : -kWear * score));
      if (outcome == kReplaced) CHECK(change >= score - kWear * score && change <= score);
      if (outcome == kReplaced) CHECK(!held && sketch.holds(key));
      if (outcome == kSkipped) CHECK(change == 0.0 && !sketch.holds(key));
      if (step % 100 == 0) {
        Outcome(kernels, sketch, 0.0f, 0.1f);
        sketch.check_owners();
      }
    }
  }
}

void test_every_key_is_ordinary() {
  Sketch sketch(1, 64, 4);
  const std::vector<int64_t> keys{0, -1, -2, std::numeric_limits<int64_t>::max(),
                                  std::numeric_limits<int64_t>::min()};
  for (const int64_t key : keys) CHECK(!sketch.holds(key));
  for (const int64_t key : keys) CHECK(insert(sketch.bucket(key), key, 1.0f) == kAbsorbed);
  for (const int64_t key : keys) CHECK(sketch.holds(key));
}

void test_scores_stay_finite() {
  Sketch sketch(1, 1, 1);
  for (int i = 0; i < 1000; ++i) insert(sketch.bucket(5), 5, kMaxScore);
  CHECK(sketch.mass() == 1000.0 * kMaxScore);
  CHECK(score_of(kMaxScore, 0x1p60) == kMaxScore);
  CHECK(!is_importance(INFINITY) && !is_importance(NAN) && !is_importance(-1.0f));
}

void test_rows_follow_the_highest_scores(const Kernels& kernels) {
  std::mt19937_64 random(1);
  Sketch sketch(1, 32, 8);
  for (int64_t key = 0; key < 60; ++key) {
    insert(sketch.bucket(key), key, static_cast<float>(random() % 10));  // many ties
  }
  const Outcome outcome(kernels, sketch, 0.0f, 0.0f);
  CHECK(outcome.promoted == 8 && outcome.demoted == 0);
  float lowest_hot = INFINITY;
  float highest_cold = 0.0f;
  const Shard shard = sketch.shard(0);
  for (int64_t slot = 0; slot < 32 * kSlots; ++slot) {
    if (shard.hot_row(slot) >= 0) lowest_hot = std::fmin(lowest_hot, shard.score(slot));
    if (shard.hot_row(slot) == kCold) highest_cold = std::fmax(highest_cold, shard.score(slot));
  }
  CHECK(lowest_hot >= highest_cold);
}

void test_minimum_score(const Kernels& kernels) {
  Sketch sketch(1, 4, 4);
  insert(sketch.bucket(1), 1, 1.0f);
  insert(sketch.bucket(2), 2, 5.0f);
  const Outcome first(kernels, sketch, 2.0f, 0.0f);
  CHECK(first.promoted == 1 && first.new_keys[0] == 2 && first.actions[0] == kCopyRow);
  const Outcome second(kernels, sketch, 9.0f, 0.0f);
  CHECK(second.demoted == 1 && second.actions[0] == kClearRow);
  sketch.check_owners();
}

void test_what_is_not_finite_is_counted(const Kernels& kernels) {
  Sketch sketch(1, 4, 2);
  std::vector<Events> events(1);
  const std::vector<int64_t> keys{5, 5, 6, 7, 8};
  const std::vector<int32_t> shards{0, 0, 0, 0, -1};
  const std::vector<float> importance{2.0f, NAN, INFINITY, -1.0f, NAN};
  const Occurrences seen{
      keys.data(), shards.data(), importance.data(), sketch.inflation.data(), true, 5};
  kernels.observe(sketch.view, seen, events.data());
  CHECK(events[0].non_finite == 3);
  CHECK(!sketch.holds(6) && !sketch.holds(7) && sketch.mass() == 2.0);
}

// 128-bit division says what rows and shards are.
void test_rows_and_shards_are_exact() {
  std::mt19937_64 random(2);
  __extension__ using uint128 = unsigned __int128;
  for (int step = 0; step < 200000; ++step) {
    const int64_t n =
        1 + static_cast<int64_t>(random() >> (17 + random() % 40)) % ((1LL << 47) - 1);
    const int64_t rows = 1 + static_cast<int64_t>(random() % n);
    const int64_t id = step % 3 == 0 ? n - 1 : static_cast<int64_t>(random() % n);
    const double ratio = static_cast<double>(rows) / static_cast<double>(n);
    const Table table{n, rows, 0, 0, 0, ratio};
    const auto row = static_cast<int64_t>(static_cast<uint128>(id) * rows / n);
    CHECK(table.shared_row(id) == row);
    for (const int64_t shards : {1, 64, 65535}) {
      CHECK(table.shard(row, shards, table.shards_per_row(shards)) ==
            static_cast<int64_t>(uint128(row) * shards / rows));
    }
  }
}

}  // namespace

int main() {
  test_mixing_is_a_bijection();
  test_every_key_is_ordinary();
  test_scores_stay_finite();
  test_rows_and_shards_are_exact();
  for (const Kernels* kernels : all_kernels()) {
    test_mixing_of_many(*kernels);
    test_random_stream(*kernels);
    test_rows_follow_the_highest_scores(*kernels);
    test_minimum_score(*kernels);
    test_what_is_not_finite_is_counted(*kernels);
  }
  std::puts("ok");
  return 0;
}
