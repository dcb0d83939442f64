// Which keys own a row: what every instruction set compiles of `rebalance`.
// Part of kernels.cpp.
#pragma once

#include <cstdlib>

#include "cpu/kernels.h"

namespace torchrec_cafe {
namespace {

int64_t count(const Shard& shard, const Candidates& which) {
  int64_t size = 0;
  for (int64_t b = 0; b < shard.num_buckets; ++b) {
    const Bucket& bucket = shard.buckets[b];
    for (int j = 0; j < kSlots; ++j) size += which.contain(bucket.hot_rows[j], bucket.scores[j]);
  }
  return size;
}

// Copies the scores of the candidates, and returns how many they are.
int64_t gather(const Shard& shard, const Candidates& which, float* scores) {
  int64_t size = 0;
  for (int64_t b = 0; b < shard.num_buckets; ++b) {
    const Bucket& bucket = shard.buckets[b];
    for (int j = 0; j < kSlots; ++j) {
      scores[size] = bucket.scores[j];
      size += which.contain(bucket.hot_rows[j], bucket.scores[j]);
    }
  }
  return size;
}

// The n-th largest of some scores, 1 <= n <= size. `left` has room for as many: those that have the
// digits found so far.
float nth_largest(const float* scores, int64_t size, int64_t n, float* left) {
  // Neighbouring scores often have the same first digit, and would wait for each other's count.
  constexpr int kHistograms = 4;
  RadixSelect select(n);
  int32_t counts[kHistograms][RadixSelect::kDigits] = {};
  for (int64_t i = 0; i < size; ++i) {
    ++counts[i % kHistograms][RadixSelect::digit(scores[i], 0)];
  }
  for (int digit = 0; digit < RadixSelect::kDigits; ++digit) {
    for (int h = 1; h < kHistograms; ++h) counts[0][digit] += counts[h][digit];
  }
  select.settle(counts[0], 0);
  for (int round = 1; round < RadixSelect::kRounds; ++round) {
    int64_t found = 0;
    for (int64_t i = 0; i < size; ++i) {
      const float score = scores[i];
      left[found] = score;  // not before it is read: `left` may be `scores`
      found += select.matches(score);
    }
    scores = left;
    size = found;
    for (int32_t& count : counts[0]) count = 0;
    for (int64_t i = 0; i < size; ++i) ++counts[0][RadixSelect::digit(scores[i], round)];
    select.settle(counts[0], round);
  }
  return select.score();
}

// The scores of all keys of a shard, and room for a selection of them.
class Scores {
 public:
  explicit Scores(const Shard& shard)
      : room_(shard.num_buckets * kSlots + 1),
        all_(static_cast<float*>(std::malloc(2 * room_ * sizeof(float)))),
        size_(gather(shard, Candidates{Candidates::kMaxRow, 0.0f}, all_)) {}
  Scores(const Scores&) = delete;
  Scores& operator=(const Scores&) = delete;
  ~Scores() { std::free(all_); }

  // The score of rank n, or 0 if there are no more than n.
  float nth(int64_t n) const { return size_ > n ? nth_largest(all_, size_, n, selected()) : 0.0f; }

  // The score of rank n of some candidates that are at least as many.
  float nth_of(const Shard& shard, int64_t n, const Candidates& which) const {
    return nth_largest(selected(), gather(shard, which, selected()), n, selected());
  }

 private:
  float* selected() const { return all_ + room_; }

  int64_t room_;  // one more than there are slots: what is not selected is written after the rest
  float* all_;
  int64_t size_;
};

void give_rows(const Shard& shard, const Scores& scores, float min_score, float hysteresis,
               int8_t* actions, int64_t* new_keys, int64_t* promoted, int64_t* demoted) {
  const Threshold threshold(scores.nth(shard.num_hot_rows), min_score, hysteresis);
  int64_t num_free = 0;
  for (int64_t row = 0; row < shard.num_hot_rows; ++row) {
    actions[row] = shard.demote(row, threshold.keep);
    new_keys[row] = 0;
    *demoted += actions[row] == kClearRow;
    num_free += shard.owners[row] == kNoOwner;
  }
  const Candidates eligible{kCold, threshold.promote};
  const int64_t num_eligible = num_free == 0 ? 0 : count(shard, eligible);
  if (num_eligible == 0) return;
  float cut = threshold.promote;  // promote above the cut, and `at_cut` keys exactly at it
  int64_t at_cut = num_eligible;
  if (num_eligible > num_free) {
    cut = scores.nth_of(shard, num_free, eligible);
    at_cut = num_free - count(shard, Candidates{kCold, float_from_bits(float_bits(cut) + 1)});
  }
  int64_t row = 0;
  for (int64_t slot = 0; slot < shard.num_buckets * kSlots; ++slot) {
    if (!shard.wants_row(slot) || shard.score(slot) < cut) continue;
    if (shard.score(slot) == cut && at_cut-- <= 0) continue;
    while (row < shard.num_hot_rows && shard.owners[row] != kNoOwner) ++row;
    if (row == shard.num_hot_rows) return;
    actions[row] = shard.promote(slot, row);
    new_keys[row] = shard.key(slot);
    ++*promoted;
  }
}

void set_medium(const Shard& shard, const Scores& scores, int64_t num_medium, float hysteresis) {
  const float at_least = scores.nth(shard.num_hot_rows + num_medium);
  const float keep = at_least * (1.0f - hysteresis);
  for (int64_t slot = 0; slot < shard.num_buckets * kSlots; ++slot) {
    shard.set_medium(slot, at_least, keep);
  }
}

void rebalance(const Shard& shard, float min_score, float hysteresis, int64_t num_medium,
               int8_t* actions, int64_t* new_keys, int64_t* promoted, int64_t* demoted) {
  const Scores scores(shard);
  give_rows(shard, scores, min_score, hysteresis, actions, new_keys, promoted, demoted);
  if (num_medium > 0) set_medium(shard, scores, num_medium, hysteresis);
}

}  // namespace
}  // namespace torchrec_cafe
