// Many threads give the bits of one, whatever the instruction set; under the thread sanitizer,
// without a race.
#include <cmath>
#include <random>
#include <thread>

#include "cpu/observe_in_parallel.h"
#include "sketch.h"

namespace {

using namespace torchrec_cafe;

constexpr int64_t kShards = 8;
constexpr int64_t kHotRows = 24;

void on_threads(int64_t tasks, const auto& run) {
  std::vector<std::thread> threads;
  for (int64_t task = 0; task < tasks; ++task) threads.emplace_back([&run, task] { run(task); });
  for (std::thread& thread : threads) thread.join();
}

struct Batch {
  std::vector<int64_t> keys;
  std::vector<int32_t> shards;
  std::vector<float> importance;

  explicit Batch(int seed, int64_t size) {
    std::mt19937_64 random(seed);
    for (int64_t i = 0; i < size; ++i) {
      const double skewed = std::generate_canonical<double, 53>(random);
      keys.push_back(static_cast<int64_t>(3000 * skewed * skewed * skewed));
      shards.push_back(static_cast<int32_t>(hash64(keys.back()) % (kShards + 1)) - 1);
      importance.push_back(random() % 97 == 0 ? NAN : static_cast<float>(random() % 1000) / 100.0f);
    }
  }

  Occurrences seen(const Sketch& sketch) const {
    return Occurrences{keys.data(),
                       shards.data(),
                       importance.data(),
                       sketch.inflation.data(),
                       true,
                       static_cast<int64_t>(keys.size())};
  }
};

// Learns from all batches, and re-assigns the rows of every shard after each.
struct Run {
  Sketch sketch{kShards, 37, kHotRows};
  std::vector<int64_t> counts = std::vector<int64_t>(kShards * 5);
  std::vector<int8_t> actions = std::vector<int8_t>(kShards * kHotRows);
  std::vector<int64_t> new_keys = std::vector<int64_t>(kShards * kHotRows);

  Run(const Kernels& kernels, const std::vector<Batch>& batches, int64_t num_threads) {
    for (const Batch& batch : batches) {
      learn(kernels, batch, num_threads);
      on_threads(kShards, [&](int64_t s) {
        kernels.rebalance(sketch.shard(s), 0.0f, 0.1f, 16, actions.data() + s * kHotRows,
                          new_keys.data() + s * kHotRows, &counts[s * 5 + 3], &counts[s * 5 + 4]);
      });
      sketch.check_owners();
    }
  }

  void learn(const Kernels& kernels, const Batch& batch, int64_t num_threads) {
    std::vector<Events> events(num_threads * kShards);
    if (num_threads == 1) {
      kernels.observe(sketch.view, batch.seen(sketch), events.data());
    } else {
      observe_in_parallel(kernels, sketch.view, {batch.seen(sketch)}, num_threads, events.data(),
                          [](int64_t n, const auto& run) { on_threads(n, run); });
    }
    for (int64_t i = 0; i < num_threads * kShards; ++i) {
      counts[i % kShards * 5] += events[i].non_finite;
      counts[i % kShards * 5 + 1] += events[i].skipped();
      counts[i % kShards * 5 + 2] += events[i].replaced();
    }
  }
};

}  // namespace

int main() {
  std::vector<Batch> batches;
  for (int seed = 0; seed < 12; ++seed) batches.emplace_back(seed, 1 + 997 * seed);
  const Run expected(kernels_default, batches, 1);
  for (int column = 0; column < 5; ++column) {  // the batches make everything happen
    int64_t total = 0;
    for (int64_t s = 0; s < kShards; ++s) total += expected.counts[s * 5 + column];
    CHECK(total > 0);
  }
  for (const Kernels* kernels : all_kernels()) {
    for (const int64_t num_threads : {1, 2, 3, 8, 16}) {
      const Run got(*kernels, batches, num_threads);
      CHECK(got.sketch == expected.sketch);
      CHECK(got.counts == expected.counts);
      CHECK(got.actions == expected.actions && got.new_keys == expected.new_keys);
    }
  }
  std::puts("ok");
  return 0;
}
