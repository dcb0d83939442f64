// The vectorised factors of the CPU against the definitions in factor_lines.h, which CUDA runs.
#include <algorithm>
#include <bit>
#include <random>
#include <vector>

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
    std::vector<float> sums(500 * kLineWeights, -7), expected(weights.size());
    std::vector<RowPlaces::Slot> slots(1024, RowPlaces::kFree);
    std::vector<int64_t> rows(500);
    RowPlaces places{slots.data(), slots.size() - 1, rows.data(), 0};
    LineBlock block;
    for (int64_t next = 0; next < size;) {
      next = kernels.encode_keys(encoder, in.keys.data(), in.shards.data(), next, size, block);
      kernels.add_to_lines(block, in.gradients.data(), places, sums.data());
    }
    std::vector<int64_t> first_hits;
    for (int64_t i = 0; i < size; ++i) {
      if (in.shards[i] < 0) {
        CHECK(factors[i] == 1);
        continue;
      }
      const uint64_t hash = encoder.hash(in.keys[i], 0);
      const int64_t line = encoder.line(hash, in.shards[i]);
      const uint32_t mask = encoder.weights(in.keys[i], hash);
      CHECK(factors[i] == sum_of_line(weights.data() + line * kLineWeights, mask));
      if (std::find(first_hits.begin(), first_hits.end(), line) == first_hits.end()) {
        first_hits.push_back(line);
      }
      for (int j = 0; j < kLineWeights; ++j) {
        if (mask >> j & 1u) expected[line * kLineWeights + j] += in.gradients[i];
      }
    }
    CHECK(places.size == static_cast<int64_t>(first_hits.size()));
    for (int64_t place = 0; place < places.size; ++place) {
      CHECK(rows[place] == first_hits[place]);
      for (int j = 0; j < kLineWeights; ++j) {
        CHECK(sums[place * kLineWeights + j] == expected[rows[place] * kLineWeights + j]);
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937_64 random(3);
  test_keys_have_a_weight_in_each_part(random);
  for (const Kernels* kernels : all_kernels()) test_kernels_match(*kernels, random);
  std::puts("ok");
  return 0;
}
