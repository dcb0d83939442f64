// MEM-REC on a CPU: what every instruction set compiles of the Bloom encodings and of the pooled
// lookup. Part of kernels.cpp.
#pragma once

#include <cstring>

#include "bloom.h"
#include "cpu/kernels.h"
#include "cpu/row_kernel.h"

namespace torchrec_cafe {
namespace {

// What both encodings of a block of ids begin with.
struct BlockOfIds {
  int64_t keys[kBloomBlock];
  int32_t shards[kBloomBlock];
  int size = 0;
};

// Plain loops without a condition, which become vector instructions.
inline void find_keys(const BloomEncoder& encoder_in, const Table& table_in,
                      const int64_t* __restrict__ ids, int size, BlockOfIds& block) {
  const Table table = table_in;  // in registers
  const BloomEncoder encoder = encoder_in;
  block.size = size;
  int64_t* __restrict__ keys = block.keys;
  int32_t* __restrict__ shards = block.shards;
  for (int i = 0; i < size; ++i) keys[i] = table.key(table.first_id + ids[i]);
  for (int i = 0; i < size; ++i) {
    shards[i] = static_cast<int32_t>(encoder.held_shard(table, table.first_id + ids[i]));
  }
}

inline void set_bits(const BloomEncoder& encoder_in, const BlockOfIds& block, BloomBits& bits) {
  const BloomEncoder encoder = encoder_in;
  const int64_t* __restrict__ keys = block.keys;
  const int32_t* __restrict__ shards = block.shards;
  const int size = block.size;
  const auto per_shard = static_cast<int32_t>(encoder.bits_per_shard);
  for (int h = 0; h < encoder.num_hashes; h += 2) {
    int32_t* __restrict__ even = bits.at[h];
    int32_t* __restrict__ odd = bits.at[h + 1];  // overwritten or not read if there is none
    for (int i = 0; i < size; ++i) {
      const uint64_t hashes = encoder.hash_pair(keys[i], h / 2);
      even[i] = shards[i] * per_shard + static_cast<int32_t>(encoder.first_of(hashes));
      odd[i] = shards[i] * per_shard + static_cast<int32_t>(encoder.second_of(hashes));
    }
  }
  // From the last on, so that each is compared with hashes that are still whole.
  for (int h = encoder.num_hashes - 1; h > 0; --h) {
    int32_t* __restrict__ at = bits.at[h];
    for (int earlier = 0; earlier < h; ++earlier) {
      const int32_t* __restrict__ other = bits.at[earlier];
      for (int i = 0; i < size; ++i) at[i] = at[i] == other[i] ? -1 : at[i];
    }
  }
}

void bloom_encode(const BloomEncoder& encoder, const Table& table, const int64_t* ids, int size,
                  BloomBits& bits) {
  BlockOfIds block;
  find_keys(encoder, table, ids, size, block);
  set_bits(encoder, block, bits);
}

// One id after the other: vector instructions would gather, which is slower than loads.
inline void add_weights(const BloomBits& bits, int num_hashes, const float* __restrict__ weights,
                        int size, float* __restrict__ factors) {
  for (int i = 0; i < size; ++i) {
    float sum = 0.0f;
    for (int h = 0; h < num_hashes; ++h) {
      const int32_t at = bits.at[h][i];
      const float weight = weights[at < 0 ? 0 : at];
      sum += at < 0 ? 0.0f : weight;
    }
    factors[i] = sum;
  }
}

void bloom_factors(const BloomEncoder& encoder, const Table& table, const int64_t* ids,
                   int64_t size, const float* weights, float* factors) {
  BloomBits bits;
  for (int64_t from = 0; from < size; from += kBloomBlock) {
    const int block = size - from < kBloomBlock ? static_cast<int>(size - from) : kBloomBlock;
    bloom_encode(encoder, table, ids + from, block, bits);
    add_weights(bits, encoder.num_hashes, weights, block, factors + from);
  }
}

// A block of ids, encoded.
struct EncodedBlock {
  BloomBits rows;
  float factors[kBloomBlock];
  int size = 0;
};

// Encodes the ids [from, end), or the first of them: their token rows, and their factors unless
// only the rows are wanted.
template <bool kFactors>
void encode(const BloomLookup& in, const Table& table, int64_t from, int64_t end,
            EncodedBlock& block) {
  // The processor loses track of streams that it sees little of between random reads.
  const int64_t* ahead = in.ids + from + 2 * kBloomBlock;
  for (int i = 0; i < kBloomBlock; i += 8) __builtin_prefetch(ahead + i);
  const int64_t left = end > from ? end - from : 0;
  block.size = left < kBloomBlock ? static_cast<int>(left) : kBloomBlock;
  BlockOfIds ids;
  find_keys(in.token_rows, table, in.ids + from, block.size, ids);
  set_bits(in.token_rows, ids, block.rows);
  if (!kFactors) return;
  BloomBits bits;
  set_bits(in.token_weights, ids, bits);
  add_weights(bits, in.token_weights.num_hashes, in.weights, block.size, block.factors);
  if (in.per_sample_weights == nullptr) return;
  for (int i = 0; i < block.size; ++i) block.factors[i] *= in.per_sample_weights[from + i];
}

// The rows of the ids of a block, by their position in it.
template <typename T>
struct TokenRows {
  const T* rows;
  int64_t dim;
  int num_hashes;

  // Asks for the rows of an id, if the block has one. Inlined for sure: GCC takes a function that
  // does nothing but ask for one that does nothing.
  __attribute__((always_inline)) void ask(const EncodedBlock& block, int i) const {
    if (i >= block.size) return;
    for (int h = 0; h < num_hashes; ++h) {
      const int64_t row = block.rows.at[h][i] < 0 ? 0 : block.rows.at[h][i];
      ask_for(rows + row * dim, dim * static_cast<int64_t>(sizeof(T)));
    }
  }

  // Rows are asked for so many ids ahead, one by one: all at once would have to wait for memory,
  // and rows asked for too early are gone again when they are added.
  static constexpr int kAhead = 32;

  __attribute__((always_inline)) void ask_ahead(const EncodedBlock& block, const EncodedBlock& next,
                                                int i) const {
    if (i + kAhead < block.size) {
      ask(block, i + kAhead);
    } else {
      ask(next, i + kAhead - block.size);
    }
  }

  // Adds the scaled rows of ids [begin, end) to a bag. `next` is the block after.
  void add(const EncodedBlock& block, int begin, int end, const EncodedBlock& next,
           float* out) const {
    const auto ask_next = [&](int i) __attribute__((always_inline)) { ask_ahead(block, next, i); };
    const auto asked = [](int) {};
    int64_t d = 0;
    if (dim >= kMany * kFloats) {
      add_columns<kMany>(block, begin, end, out, d, ask_next);
      d = kMany * kFloats;
    } else {
      for (int i = begin; i < end; ++i) ask_next(i);
    }
    for (; d + kMany * kFloats <= dim; d += kMany * kFloats) {
      add_columns<kMany>(block, begin, end, out, d, asked);
    }
    for (; d + kFloats <= dim; d += kFloats) add_columns<1>(block, begin, end, out, d, asked);
    for (; d < dim; ++d) {
      each_row(block, begin, end, asked,
               [&](const T* row, float factor) { out[d] += factor * to_float(row[d]); });
    }
  }

 private:
  // Vectors that are added up in registers.
#if defined(__AVX512F__)
  static constexpr int kMany = 8;
#else
  static constexpr int kMany = 4;
#endif

  template <int kVectors, typename Before>
  void add_columns(const EncodedBlock& block, int begin, int end, float* out, int64_t d,
                   const Before& before) const {
    Floats sums[kVectors];
    for (int v = 0; v < kVectors; ++v) load(out + d + v * kFloats, sums[v]);
    each_row(block, begin, end, before, [&](const T* row, float factor) {
      for (int v = 0; v < kVectors; ++v) {
        Floats x;
        load(row + d + v * kFloats, x);
        sums[v] += factor * x;
      }
    });
    std::memcpy(out + d, sums, sizeof(sums));
  }

  template <typename Before, typename Run>
  void each_row(const EncodedBlock& block, int begin, int end, const Before& before,
                const Run& run) const {
    for (int i = begin; i < end; ++i) {
      before(i);
      for (int h = 0; h < num_hashes; ++h) {
        const int64_t row = block.rows.at[h][i];
        if (row >= 0) run(rows + row * dim, block.factors[i]);
      }
    }
  }
};

template <typename T>
void pool_bags(const BloomLookup& in, int64_t feature, int64_t first, int64_t last) {
  const Table table = in.tables[feature];
  const int64_t* offsets = in.offsets + feature * in.batch_size;
  const int64_t end = offsets[last];
  const int64_t stride = in.num_features * in.dim;
  float* out = in.pooled + first * stride + feature * in.dim - stride;
  // Cleared one by one, to be in the first cache when rows are added.
  const auto begin_bag = [&] {
    out += stride;
    std::memset(out, 0, in.dim * sizeof(float));
  };
  const TokenRows<T> token_rows{static_cast<const T*>(in.rows), in.dim, in.token_rows.num_hashes};
  EncodedBlock blocks[2];
  int current = 0;
  int64_t bag = first;
  begin_bag();
  encode<true>(in, table, offsets[first], end, blocks[0]);
  for (int i = 0; i < token_rows.kAhead; ++i) token_rows.ask(blocks[0], i);
  for (int64_t from = offsets[first]; from < end; from += kBloomBlock, current ^= 1) {
    const EncodedBlock& block = blocks[current];
    EncodedBlock& next = blocks[current ^ 1];
    encode<true>(in, table, from + kBloomBlock, end, next);
    for (int i = 0; i < block.size;) {
      for (; offsets[bag + 1] <= from + i; begin_bag()) ++bag;
      const int64_t left = offsets[bag + 1] - from;
      const int stop = left < block.size ? static_cast<int>(left) : block.size;
      token_rows.add(block, i, stop, next, out);
      i = stop;
    }
  }
  for (++bag; bag < last; ++bag) begin_bag();  // empty ones at the end
}

template <typename T>
void dot_bags(const BloomLookup& in, int64_t feature, int64_t first, int64_t last, float* dots) {
  const Table table = in.tables[feature];
  const int64_t* offsets = in.offsets + feature * in.batch_size;
  const int64_t end = offsets[last];
  const auto* rows = static_cast<const T*>(in.rows);
  const TokenRows<T> token_rows{rows, in.dim, in.token_rows.num_hashes};
  EncodedBlock blocks[2];
  int current = 0;
  int64_t bag = first;
  encode<false>(in, table, offsets[first], end, blocks[0]);
  for (int64_t from = offsets[first]; from < end; from += kBloomBlock, current ^= 1) {
    const EncodedBlock& block = blocks[current];
    encode<false>(in, table, from + kBloomBlock, end, blocks[current ^ 1]);
    for (int i = 0; i < block.size; ++i) {
      token_rows.ask_ahead(block, blocks[current ^ 1], i);
      while (offsets[bag + 1] <= from + i) ++bag;
      const float* grad = in.grad + (bag * in.num_features + feature) * in.dim;
      float sum = 0.0f;
      for (int h = 0; h < in.token_rows.num_hashes; ++h) {
        const int64_t row = block.rows.at[h][i];
        if (row >= 0) sum += dot(grad, rows + row * in.dim, in.dim);
      }
      const float* weights = in.per_sample_weights;
      dots[from + i] = weights == nullptr ? sum : sum * weights[from + i];
    }
  }
}

void bloom_dots(const BloomLookup& in, int64_t feature, int64_t first, int64_t last, float* dots) {
  const auto run = in.half ? dot_bags<uint16_t> : dot_bags<float>;
  run(in, feature, first, last, dots);
}

void bloom_pool(const BloomLookup& in, int64_t feature, int64_t first, int64_t last) {
  const auto pool = in.half ? pool_bags<uint16_t> : pool_bags<float>;
  pool(in, feature, first, last);
}

}  // namespace
}  // namespace torchrec_cafe
