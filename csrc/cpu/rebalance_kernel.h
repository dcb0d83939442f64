// Which keys own a row: what every instruction set compiles of `rebalance`.
// Part of kernels.cpp.
#pragma once

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

// The n-th largest score of the candidates, 1 <= n <= their number.
float nth_largest(const Shard& shard, int64_t n, const Candidates& which) {
  RadixSelect select(n);
  for (int round = 0; round < RadixSelect::kRounds; ++round) {
    // One histogram a slot: neighbouring scores often have the same digit, and would wait for each
    // other's count.
    int32_t counts[kSlots][RadixSelect::kDigits] = {};
    for (int64_t b = 0; b < shard.num_buckets; ++b) {
      const Bucket& bucket = shard.buckets[b];
      for (int j = 0; j < kSlots; ++j) {
        const float score = bucket.scores[j];
        if (which.contain(bucket.hot_rows[j], score) && select.matches(score)) {
          ++counts[j][RadixSelect::digit(score, round)];
        }
      }
    }
    for (int digit = 0; digit < RadixSelect::kDigits; ++digit) {
      for (int j = 1; j < kSlots; ++j) counts[0][digit] += counts[j][digit];
    }
    select.settle(counts[0], round);
  }
  return select.score();
}

void give_rows(const Shard& shard, float min_score, float hysteresis, int8_t* actions,
               int64_t* new_keys, int64_t* promoted, int64_t* demoted) {
  const Candidates all{Candidates::kMaxRow, 0.0f};
  const bool scarce = count(shard, all) > shard.num_hot_rows;
  const float nth = scarce ? nth_largest(shard, shard.num_hot_rows, all) : 0.0f;
  const Threshold threshold(nth, min_score, hysteresis);
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
    cut = nth_largest(shard, num_free, eligible);
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

void set_medium(const Shard& shard, int64_t num_medium, float hysteresis) {
  const Candidates all{Candidates::kMaxRow, 0.0f};
  const int64_t rank = shard.num_hot_rows + num_medium;
  const float at_least = count(shard, all) > rank ? nth_largest(shard, rank, all) : 0.0f;
  const float keep = at_least * (1.0f - hysteresis);
  for (int64_t slot = 0; slot < shard.num_buckets * kSlots; ++slot) {
    shard.set_medium(slot, at_least, keep);
  }
}

void rebalance(const Shard& shard, float min_score, float hysteresis, int64_t num_medium,
               int8_t* actions, int64_t* new_keys, int64_t* promoted, int64_t* demoted) {
  give_rows(shard, min_score, hysteresis, actions, new_keys, promoted, demoted);
  if (num_medium > 0) set_medium(shard, num_medium, hysteresis);
}

}  // namespace
}  // namespace torchrec_cafe
