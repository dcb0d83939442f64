// Factors of ids on a CPU: what every instruction set compiles of them. Part of kernels.cpp.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/row_kernel.h"
#include "factor_lines.h"

namespace torchrec_cafe {
namespace {

// Keys that are passed over at once if none has a shard, as in tables that are not tracked.
constexpr int kKeyRun = 16;
// Keys that are encoded together.
constexpr int kLineBlock = 64;

// The lines of keys that have shards, and their weights as masks. Plain loops without a condition,
// which become vector instructions.
template <int kMost>
inline void encode_lines(const LineEncoder& encoder, const int64_t* __restrict__ keys,
                         const int32_t* __restrict__ shards, int size, int32_t* __restrict__ lines,
                         uint32_t* __restrict__ masks) {
  uint64_t hashes[kMost];
  for (int i = 0; i < size; ++i) hashes[i] = encoder.hash(keys[i], 0);
  for (int i = 0; i < size; ++i) {
    lines[i] = static_cast<int32_t>(encoder.line(hashes[i], shards[i]));
    masks[i] = 0;
  }
  for (int part = 0; part < encoder.num_hashes; ++part) {
    if (part > 0 && LineEncoder::shift_of_part(part) == 0) {
      const int next = LineEncoder::hash_of_part(part);
      for (int i = 0; i < size; ++i) hashes[i] = encoder.hash(keys[i], next);
    }
    for (int i = 0; i < size; ++i) masks[i] |= encoder.weight(hashes[i], part);
  }
}

// Keys that have weights, encoded.
struct LineBlock {
  int64_t at[kLineBlock];  // whose factor it is
  int32_t lines[kLineBlock];
  uint32_t masks[kLineBlock];
  int size;
};

// Takes the next keys that have a shard, at most kLineBlock, from that at `from` on. Returns where
// to go on, `end` at last.
int64_t encode_keys(const LineEncoder& encoder, const int64_t* keys, const int32_t* shards,
                    int64_t from, int64_t end, LineBlock& block) {
  int64_t found[kLineBlock];
  int32_t shard[kLineBlock];
  int count = 0;
  while (from < end && count < kLineBlock) {
    const int64_t run = end - from < kKeyRun ? end - from : kKeyRun;
    int32_t all = -1;
    for (int64_t i = 0; i < run; ++i) all &= shards[from + i];
    if (all < 0) {
      from += run;
      continue;
    }
    // No condition on the shard: whether a key has one is a coin toss for the branch predictor.
    for (const int64_t last = from + run; from < last && count < kLineBlock; ++from) {
      block.at[count] = from;
      found[count] = keys[from];
      shard[count] = shards[from];
      count += shards[from] >= 0;
    }
  }
  encode_lines<kLineBlock>(encoder, found, shard, count, block.lines, block.masks);
  block.size = count;
  return from;
}

typedef uint32_t LineBits __attribute__((vector_size(64)));

// Clears the lanes of all weights but those of a mask.
inline void keep(uint32_t mask, LineBits& weights) {
  constexpr LineBits kBits = {1u << 0,  1u << 1,  1u << 2,  1u << 3, 1u << 4,  1u << 5,
                              1u << 6,  1u << 7,  1u << 8,  1u << 9, 1u << 10, 1u << 11,
                              1u << 12, 1u << 13, 1u << 14, 1u << 15};
  weights &= reinterpret_cast<LineBits>((kBits & mask) != 0);
}

// As sum_of_line.
inline float sum_of(const float* line, uint32_t mask) {
  LineBits weights;
  std::memcpy(&weights, line, sizeof(weights));
  keep(mask, weights);
  return add_up(reinterpret_cast<Floats>(weights));
}

void key_factors(const LineEncoder& encoder_in, const int64_t* keys, const int32_t* shards,
                 int64_t size, const float* weights, float* factors) {
  const LineEncoder encoder = encoder_in;  // in registers
  for (int64_t i = 0; i < size; ++i) factors[i] = 1.0f;
  // The lines of a block are asked for while those of the one before are added up.
  LineBlock blocks[2];
  int current = 0;
  int64_t next = encode_keys(encoder, keys, shards, 0, size, blocks[0]);
  while (blocks[current].size > 0) {
    const LineBlock& block = blocks[current];
    LineBlock& ahead = blocks[current ^= 1];
    next = encode_keys(encoder, keys, shards, next, size, ahead);
    for (int i = 0; i < ahead.size; ++i) {
      __builtin_prefetch(weights + ahead.lines[i] * int64_t{kLineWeights});
    }
    for (int i = 0; i < block.size; ++i) {
      const float* line = weights + block.lines[i] * int64_t{kLineWeights};
      factors[block.at[i]] = sum_of(line, block.masks[i]);
    }
  }
}

bool gather(const float* __restrict__ from, int64_t from_size, const int32_t* __restrict__ at,
            int64_t size, float* __restrict__ to) {
  int32_t wrong = 0;
  const auto end = static_cast<int32_t>(from_size);
  for (int64_t i = 0; i < size; ++i) wrong |= (at[i] < 0) | (at[i] >= end);
  if (wrong != 0) return false;
  for (int64_t i = 0; i < size; ++i) to[i] = from[at[i]];
  return true;
}

}  // namespace
}  // namespace torchrec_cafe
