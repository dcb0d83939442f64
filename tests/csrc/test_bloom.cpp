// The vectorised encodings of the CPU against the definition in bloom.h, which CUDA runs.
#include <algorithm>
#include <random>

#include "bloom.h"
#include "sketch.h"

namespace {

using namespace torchrec_cafe;

Table random_table(std::mt19937_64& random, int64_t num_shards) {
  const int64_t num_ids = 1 + static_cast<int64_t>(random() >> (17 + random() % 40)) % (1LL << 40);
  const double ratio = static_cast<double>(num_shards) / static_cast<double>(num_ids);
  return Table{num_ids, num_shards, 0, 0, static_cast<int64_t>(random() % 100), ratio};
}

void test_a_block_is_encoded_as_its_ids(const Kernels& kernels) {
  std::mt19937_64 random(3);
  int64_t ids[kBloomBlock];
  BloomBits block;
  int64_t bits[kMaxHashes];
  for (int step = 0; step < 3000; ++step) {
    const int64_t num_shards = 1 + random() % 9;
    const int64_t first_shard = random() % num_shards;
    const int64_t held = 1 + random() % (num_shards - first_shard);
    const Table table = random_table(random, num_shards);
    // Few bits, so that hash functions meet.
    const int64_t per_shard = 1 + random() % (step % 2 == 0 ? 5 : 100000);
    const int num_hashes = 1 + static_cast<int>(random() % kMaxHashes);
    const int first_pair = step % 3 == 0 ? kTokenPairs : kWeightPairs;
    const BloomEncoder encoder(first_shard, held, per_shard, num_hashes, first_pair);
    const int size = 1 + static_cast<int>(random() % kBloomBlock);
    for (int i = 0; i < size; ++i) ids[i] = static_cast<int64_t>(random() % table.num_ids);
    kernels.bloom_encode(encoder, table, ids, size, block);
    for (int i = 0; i < size; ++i) {
      const int count = encoder.encode(table, ids[i], bits);
      int found = 0;
      for (int h = 0; h < num_hashes; ++h) {
        if (block.at[h][i] < 0) continue;
        CHECK(found < count && block.at[h][i] == bits[found]);
        CHECK(bits[found] >= 0 && bits[found] < held * per_shard);
        CHECK(std::find(bits, bits + found, bits[found]) == bits + found);
        ++found;
      }
      CHECK(found == count && count >= 1);
    }
  }
}

}  // namespace

int main() {
  for (const Kernels* kernels : all_kernels()) test_a_block_is_encoded_as_its_ids(*kernels);
  std::puts("ok");
  return 0;
}
