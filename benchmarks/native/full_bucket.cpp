// What should a full bucket do with a newcomer? The candidates, each on the same stream, as plain as
// can be. `wear` is what torchrec_cafe does; the benchmark checks that it finds the same keys.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace {

constexpr int kSlots = 4;
constexpr int kFree = -2;
constexpr int kCold = -1;

enum Rule {
  kSpaceSaving,     // the smallest cold slot goes; the newcomer inherits its score
  kSpaceSavingAll,  // the same for the smallest slot, hot or not: its row is lost
  kReleased,        // the same, but if the smallest slot is hot the newcomer is dropped
  kReplace,         // the smallest cold slot goes; nothing is inherited
  kWear,            // the smallest cold slot loses `wear` of the score, and goes when none is left
};

struct Bucket {
  int64_t keys[kSlots];
  float scores[kSlots];
  int32_t rows[kSlots];
};

uint64_t hash64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

int64_t reduce(uint64_t hash, int64_t n) {
  __extension__ using uint128 = unsigned __int128;
  return static_cast<int64_t>((static_cast<uint128>(hash) * n) >> 64);
}

void insert(Bucket& b, int64_t key, float score, Rule rule, float wear) {
  int free = -1;
  int smallest = -1;
  int coldest = -1;
  for (int j = 0; j < kSlots; ++j) {
    if (b.rows[j] == kFree) {
      if (free < 0) free = j;
      continue;
    }
    if (b.keys[j] == key) {
      b.scores[j] += score;
      return;
    }
    if (smallest < 0 || b.scores[j] < b.scores[smallest]) smallest = j;
    if (b.rows[j] == kCold && (coldest < 0 || b.scores[j] < b.scores[coldest])) coldest = j;
  }
  int victim = rule == kSpaceSavingAll || rule == kReleased ? smallest : coldest;
  float inherited = rule <= kReleased && free < 0 && victim >= 0 ? b.scores[victim] : 0.0f;
  if (free >= 0) {
    victim = free;
  } else if (victim < 0 || (rule == kReleased && b.rows[victim] >= 0)) {
    return;
  } else if (rule == kWear) {
    b.scores[victim] -= wear * score;
    if (b.scores[victim] > 0.0f) return;
  }
  b.keys[victim] = key;
  b.scores[victim] = inherited + score;
  b.rows[victim] = kCold;
}

// Hot rows of a shard to its highest scores, as torchrec_cafe.ops.rebalance.
int64_t rebalance(Bucket* buckets, int64_t size, int64_t hot_rows, float hysteresis) {
  std::vector<float> scores;
  for (int64_t i = 0; i < size * kSlots; ++i) {
    if (buckets[i / kSlots].rows[i % kSlots] != kFree) {
      scores.push_back(buckets[i / kSlots].scores[i % kSlots]);
    }
  }
  float threshold = 0.0f;
  if (static_cast<int64_t>(scores.size()) > hot_rows) {
    std::nth_element(scores.begin(), scores.begin() + hot_rows - 1, scores.end(),
                     std::greater<float>());
    threshold = scores[hot_rows - 1];
  }
  int64_t left = hot_rows;
  std::vector<std::pair<float, int64_t>> eligible;
  for (int64_t i = 0; i < size * kSlots; ++i) {
    int32_t& row = buckets[i / kSlots].rows[i % kSlots];
    const float score = buckets[i / kSlots].scores[i % kSlots];
    if (row >= 0 && score < threshold * (1.0f - hysteresis)) row = kCold;
    left -= row >= 0;
    if (row == kCold && score >= threshold) eligible.push_back({-score, i});
  }
  std::sort(eligible.begin(), eligible.end());
  const int64_t promoted = std::min<int64_t>(left, eligible.size());
  for (int64_t i = 0; i < promoted; ++i) {
    buckets[eligible[i].second / kSlots].rows[eligible[i].second % kSlots] = 0;
  }
  return promoted;
}

}  // namespace

// Adds a batch, every occurrence of the same score; `size` buckets a shard.
extern "C" void add(Bucket* buckets, int64_t size, const int64_t* keys, const int32_t* shards,
                    int64_t count, float score, int rule, float wear) {
  for (int64_t i = 0; i < count; ++i) {
    Bucket& bucket = buckets[shards[i] * size + reduce(hash64(keys[i]), size)];
    insert(bucket, keys[i], score, static_cast<Rule>(rule), wear);
  }
}

// Re-assigns the rows of all shards; returns how many keys were promoted.
extern "C" int64_t rebalance_all(Bucket* buckets, int64_t shards, int64_t size, int64_t hot_rows,
                                 float hysteresis) {
  int64_t promoted = 0;
  for (int64_t s = 0; s < shards; ++s) {
    promoted += rebalance(buckets + s * size, size, hot_rows, hysteresis);
  }
  return promoted;
}
