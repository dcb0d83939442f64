// The vectorised factors of the CPU, and their gradients, against the definitions in
// factor_lines.h, which CUDA runs.
#include <algorithm>
#include <bit>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "cpu/line_sums.h"
#include "factor_lines.h"
#include "sketch.h"

namespace {

using namespace torchrec_cafe;

struct Keys {
  std::vector<int64_t> keys;
  std::vector<int32_t> shards;
  std::vector<float> gradients;

  Keys(std::mt19937_64& random, int64_t size, int64_t shards_held) {
    for (int64_t i = 0; i < size; ++i) {
      keys.push_back(static_cast<int64_t>(random() >> 8));
      // Long runs without a shard, and single ones.
      const bool tracked = i / 40 % 3 != 0 && random() % 4 != 0;
      shards.push_back(tracked ? static_cast<int32_t>(random() % shards_held) : -1);
      gradients.push_back(static_cast<float>(random() % 1000) - 500);
    }
  }
};

void test_keys_have_a_weight_in_each_part(std::mt19937_64& random) {
  for (int step = 0; step < 2000; ++step) {
    const LineEncoder encoder(3, kLineWeights * (1 + random() % 9), 1 + random() % kMaxLineHashes);
    const auto key = static_cast<int64_t>(random());
    const uint64_t hash = encoder.hash(key, 0);
    const int64_t shard = random() % 3;
    const int64_t line = encoder.line(hash, shard) - shard * encoder.lines_per_shard;
    CHECK(line >= 0 && line < encoder.lines_per_shard);
    const uint32_t mask = encoder.weights(key, hash);
    for (int part = 0; part < encoder.num_hashes; ++part) {
      const int first = kLineWeights * part / encoder.num_hashes;
      const int end = kLineWeights * (part + 1) / encoder.num_hashes;
      CHECK(std::popcount(mask >> first & ((1u << (end - first)) - 1)) == 1);
    }
    CHECK(std::popcount(mask) == encoder.num_hashes);
  }
}

void test_kernels_match(const Kernels& kernels, std::mt19937_64& random) {
  for (int step = 0; step < 300; ++step) {
    const int64_t held = 1 + random() % 5, lines = 1 + random() % (step % 2 == 0 ? 3 : 200);
    const LineEncoder encoder(held, kLineWeights * lines, 1 + random() % kMaxLineHashes);
    const Keys in(random, random() % 500, held);
    const auto size = static_cast<int64_t>(in.keys.size());
    std::vector<float> weights(encoder.num_lines() * kLineWeights), factors(size);
    for (float& weight : weights) weight = static_cast<float>(random() % 4096) / 1024;
    kernels.key_factors(encoder, in.keys.data(), in.shards.data(), size, weights.data(),
                        factors.data());
    for (int64_t i = 0; i < size; ++i) {
      if (in.shards[i] < 0) {
        CHECK(factors[i] == 1);
        continue;
      }
      const uint64_t hash = encoder.hash(in.keys[i], 0);
      const int64_t line = encoder.line(hash, in.shards[i]);
      const uint32_t mask = encoder.weights(in.keys[i], hash);
      CHECK(factors[i] == sum_of_line(weights.data() + line * kLineWeights, mask));
    }
  }
}

// Samples of four features, of which the first and the last are wanted; bags of up to three rows.
void test_gradients_are_of_wanted_rows(const Kernels& kernels, std::mt19937_64& random) {
  for (int step = 0; step < 100; ++step) {
    const int64_t dim = 4 * (1 + random() % 9), samples = random() % 60;
    const Keys ids(random, 90, 3);
    const LineEncoder encoder(3, kLineWeights * 7, 1 + random() % kMaxLineHashes);
    std::vector<int64_t> rows, offsets{0};
    std::vector<int32_t> source;
    for (int64_t bag = 0; bag < 4 * samples; ++bag) {
      for (int64_t i = random() % 4; i > 0; --i) {
        rows.push_back(random() % 20);
        source.push_back(static_cast<int32_t>(random() % 90));
      }
      offsets.push_back(static_cast<int64_t>(rows.size()));
    }
    std::vector<float> table(20 * dim), grad(4 * samples * dim);
    for (float& value : table) value = static_cast<float>(random() % 9) - 4;
    for (float& value : grad) value = static_cast<float>(random() % 9) - 4;
    const int64_t features[] = {0, 3};
    const ScaledRows in{grad.data(),
                        table.data(),
                        false,
                        dim,
                        rows.data(),
                        offsets.data(),
                        source.data(),
                        ids.keys.data(),
                        ids.shards.data(),
                        step % 2 == 0 ? nullptr : ids.gradients.data(),
                        features,
                        2,
                        4,
                        20,
                        90};
    std::vector<LineGradient> out(rows.size() + 1);
    int64_t wrong = -1;
    const int64_t size = kernels.line_gradients(encoder, in, 0, samples, out.data(), wrong);
    CHECK(wrong == -1);
    int64_t next = 0;
    for (int64_t bag = 0; bag < 4 * samples; ++bag) {
      for (int64_t m = offsets[bag]; m < offsets[bag + 1]; ++m) {
        const int32_t id = source[m];
        if ((bag % 4 != 0 && bag % 4 != 3) || ids.shards[id] < 0) continue;
        float dot = 0;  // of small whole numbers: in any order
        for (int64_t d = 0; d < dim; ++d) dot += grad[bag * dim + d] * table[rows[m] * dim + d];
        const uint64_t hash = encoder.hash(ids.keys[id], 0);
        CHECK(out[next].line == encoder.line(hash, ids.shards[id]));
        CHECK(out[next].mask == encoder.weights(ids.keys[id], hash));
        CHECK(out[next].gradient == (step % 2 == 0 ? dot : dot * ids.gradients[id]));
        ++next;
      }
    }
    CHECK(next == size);
  }
}

void on_threads(int64_t tasks, const auto& run) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&run, thread, tasks] {
      for (int64_t task = thread; task < tasks; task += kThreads) run(task);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// The sums by line of what is added, in its order.
std::map<int64_t, std::vector<float>> sums_of(const std::vector<LineGradient>& added) {
  std::map<int64_t, std::vector<float>> sums;
  for (const LineGradient& one : added) {
    std::vector<float>& line = sums.try_emplace(one.line, kLineWeights, 0.0f).first->second;
    for (int j = 0; j < kLineWeights; ++j) line[j] += (one.mask >> j & 1u) ? one.gradient : 0.0f;
  }
  return sums;
}

void test_sums_are_those_of_one_thread(const Kernels& kernels, std::mt19937_64& random) {
  for (const int64_t size : {0, 1, 500, 20'000, 100'000}) {
    const int64_t num_lines = 1 + random() % (size % 3 == 0 ? 7 : 90'000);
    std::vector<LineGradient> added(size);
    for (LineGradient& one : added) {
      one = {static_cast<int32_t>(random() % num_lines), static_cast<uint32_t>(random() & 0xffffu),
             static_cast<float>(random() % 1000) / 7 - 70};
    }
    const std::map<int64_t, std::vector<float>> expected = sums_of(added);
    const int64_t third = size / 3;  // of three pieces, one may be empty
    const LineSums sums(
        kernels,
        {{added.data(), third}, {added.data() + third, 0}, {added.data() + third, size - third}},
        num_lines, [](int64_t tasks, const auto& run) { on_threads(tasks, run); });
    CHECK(sums.size() == static_cast<int64_t>(expected.size()));
    std::vector<int64_t> lines(sums.size());
    std::vector<float> weights(sums.size() * kLineWeights, -7);
    sums.write(lines.data(), weights.data(),
               [](int64_t tasks, const auto& run) { on_threads(tasks, run); });
    for (int64_t at = 0; at < sums.size(); ++at) {
      const std::vector<float>& line = expected.at(lines[at]);
      CHECK(std::equal(line.begin(), line.end(), weights.data() + at * kLineWeights));
    }
    std::sort(lines.begin(), lines.end());
    CHECK(std::adjacent_find(lines.begin(), lines.end()) == lines.end());
  }
}

}  // namespace

int main() {
  std::mt19937_64 random(3);
  test_keys_have_a_weight_in_each_part(random);
  for (const Kernels* kernels : all_kernels()) {
    test_kernels_match(*kernels, random);
    test_gradients_are_of_wanted_rows(*kernels, random);
    test_sums_are_those_of_one_thread(*kernels, random);
  }
  std::puts("ok");
  return 0;
}
