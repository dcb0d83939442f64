// Properties of the torch-free algorithm, also run under the address and undefined-behaviour
// sanitizers: long random streams, every hot row with one owner, no write out of bounds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "hot_sketch_observe.h"
#include "row_map.h"

namespace {

using namespace torchrec_cafe;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

struct Sketch {
  std::vector<int64_t> keys;
  std::vector<float> scores;
  std::vector<int32_t> hot_rows;
  std::vector<int32_t> owners;
  std::vector<int8_t> actions;
  std::vector<int64_t> new_keys;
  HotSketchShard shard;

  Sketch(int64_t buckets, int64_t rows)
      : keys(buckets * kSlots, 0),
        scores(buckets * kSlots, 0.0f),
        hot_rows(buckets * kSlots, kFree),
        owners(rows, kNoOwner),
        actions(rows, kKeepRow),
        new_keys(rows, 0),
        shard{keys.data(), scores.data(), hot_rows.data(), owners.data(), buckets, rows} {}

  RebalanceCounts rebalance(float min_score, float hysteresis) {
    return torchrec_cafe::rebalance(shard, min_score, hysteresis, actions.data(), new_keys.data());
  }

  double mass() const { return std::accumulate(scores.begin(), scores.end(), 0.0); }

  void check_owners() const {
    std::set<int32_t> owned;
    for (size_t slot = 0; slot < keys.size(); ++slot) {
      if (hot_rows[slot] < 0) continue;
      CHECK(hot_rows[slot] < shard.num_hot_rows);
      CHECK(owned.insert(hot_rows[slot]).second);
      CHECK(owners[hot_rows[slot]] == static_cast<int32_t>(slot));
    }
    for (int64_t row = 0; row < shard.num_hot_rows; ++row) {
      CHECK((owners[row] == kNoOwner) == (owned.count(static_cast<int32_t>(row)) == 0));
    }
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

void test_random_stream() {
  std::mt19937_64 random(0);
  for (const int64_t rows : {1, 3, 16, 64}) {
    Sketch sketch(16, rows);
    double observed = 0.0;
    for (int step = 0; step < 20000; ++step) {
      const auto key = static_cast<int64_t>(random() % 500);
      const float score = static_cast<float>(random() % 4);
      const Insertion outcome = insert(sketch.shard, key, score);
      if (outcome == Insertion::kSkipped) continue;
      observed += score;
      CHECK(sketch.shard.find(key) >= 0);
      if (step % 100 == 0) {
        sketch.rebalance(0.0f, 0.1f);
        sketch.check_owners();
      }
    }
    CHECK(sketch.mass() == observed);
  }
}

void test_every_key_is_ordinary() {
  Sketch sketch(64, 4);
  const std::vector<int64_t> keys{0, -1, -2, std::numeric_limits<int64_t>::max(),
                                  std::numeric_limits<int64_t>::min()};
  for (const int64_t key : keys) CHECK(sketch.shard.find(key) < 0);
  for (const int64_t key : keys) CHECK(insert(sketch.shard, key, 1.0f) == Insertion::kInserted);
  for (const int64_t key : keys) CHECK(insert(sketch.shard, key, 1.0f) == Insertion::kHit);
}

void test_rows_follow_the_highest_scores() {
  std::mt19937_64 random(1);
  Sketch sketch(32, 8);
  for (int64_t key = 0; key < 60; ++key) {
    insert(sketch.shard, key, static_cast<float>(random() % 10));  // many ties
  }
  const RebalanceCounts counts = sketch.rebalance(0.0f, 0.0f);
  CHECK(counts.promoted == 8 && counts.demoted == 0);
  float lowest_hot = INFINITY;
  float highest_cold = 0.0f;
  for (size_t slot = 0; slot < sketch.keys.size(); ++slot) {
    if (sketch.hot_rows[slot] >= 0) lowest_hot = std::fmin(lowest_hot, sketch.scores[slot]);
    if (sketch.hot_rows[slot] == kCold) highest_cold = std::fmax(highest_cold, sketch.scores[slot]);
  }
  CHECK(lowest_hot >= highest_cold);
  CHECK(counts.threshold == lowest_hot);
}

void test_minimum_score() {
  Sketch sketch(4, 4);
  insert(sketch.shard, 1, 1.0f);
  insert(sketch.shard, 2, 5.0f);
  CHECK(sketch.rebalance(2.0f, 0.0f).promoted == 1);
  CHECK(sketch.new_keys[0] == 2 && sketch.actions[0] == kCopyRow);
  CHECK(sketch.rebalance(9.0f, 0.0f).demoted == 1);
  CHECK(sketch.actions[0] == kClearRow);
  sketch.check_owners();
}

void test_observe_skips_what_is_not_finite() {
  Sketch sketch(4, 2);
  double norms[2] = {0.0, 0.0};
  double inflation = 1.0;
  int64_t counters[kCounters] = {};
  const std::vector<int32_t> order{0, 1, 2, 3};
  const std::vector<int64_t> keys{5, 5, 6, 7};
  const std::vector<float> importance{2.0f, NAN, INFINITY, -1.0f};
  const Occurrences seen{order.data(), 4, keys.data(), importance.data()};
  observe(sketch.shard, seen, ShardStatistics{norms, 1, &inflation, counters}, 1.0, 1.0);
  CHECK(counters[kNonFinite] == 3);
  CHECK(sketch.shard.find(6) < 0 && sketch.shard.find(7) < 0);
  CHECK(sketch.mass() == 1.0);  // one occurrence of average importance
}

void test_rows_and_shards_are_monotone() {
  for (const Table table : {Table{1000, 7, 0, 0, 0}, Table{50, 50, 0, 0, 0}}) {
    int64_t row = 0;
    int64_t shard = 0;
    for (int64_t id = 0; id < table.num_ids; ++id) {
      const int64_t next = table.shared_row(id);
      CHECK(next >= row && next <= row + 1 && next < table.shared_rows);
      CHECK(table.shard(next, 64) >= shard && table.shard(next, 64) < 64);
      row = next;
      shard = table.shard(next, 64);
    }
    CHECK(row == table.shared_rows - 1);
  }
}

}  // namespace

int main() {
  test_mixing_is_a_bijection();
  test_random_stream();
  test_every_key_is_ordinary();
  test_rows_follow_the_highest_scores();
  test_minimum_score();
  test_observe_skips_what_is_not_finite();
  test_rows_and_shards_are_monotone();
  std::puts("ok");
  return 0;
}
