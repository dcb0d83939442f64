// The gradient of factors on a CPU, and of the weights that make them up. Part of kernels.cpp.
#pragma once

#include <cstring>

#include "cpu/factor_kernel.h"
#include "cpu/kernels.h"
#include "cpu/row_kernel.h"

namespace torchrec_cafe {
namespace {

// Lookups whose rows are to be multiplied with the gradients of their bags.
struct WantedRows {
  static constexpr int kMost = 256;
  // Rows that are asked for ahead of their use.
  static constexpr int kAhead = 32;

  int64_t at[kMost];
  int64_t bags[kMost];

  // Apart from the search for what is wanted, which needs the registers.
  template <typename T>
  __attribute__((noinline)) void multiply(const LineEncoder& encoder_in, const ScaledRows& in_in,
                                          int size, LineGradient* out) const {
    const LineEncoder encoder = encoder_in;  // in registers
    const ScaledRows in = in_in;
    const auto* table = static_cast<const T*>(in.table);
    const auto ask = [&](int i) __attribute__((always_inline)) {
      if (i >= size) return;
      ask_for(table + in.rows[at[i]] * in.dim, in.dim * static_cast<int64_t>(sizeof(T)));
      ask_for(in.grad + bags[i] * in.dim, in.dim * static_cast<int64_t>(sizeof(float)));
    };
    for (int i = 0; i < kAhead; ++i) ask(i);
    int64_t keys[kMost] = {};  // GCC takes those beyond `size` for read
    int32_t shards[kMost] = {}, lines[kMost];
    uint32_t masks[kMost];
    for (int i = 0; i < size; ++i) keys[i] = in.keys[in.source[at[i]]];
    for (int i = 0; i < size; ++i) shards[i] = in.shards[in.source[at[i]]];
    encode_lines<kMost>(encoder, keys, shards, size, lines, masks);
    for (int i = 0; i < size; ++i) {
      ask(i + kAhead);
      float gradient = dot(in.grad + bags[i] * in.dim, table + in.rows[at[i]] * in.dim, in.dim);
      if (in.given != nullptr) gradient *= in.given[in.source[at[i]]];
      out[i] = {lines[i], masks[i], gradient};
    }
  }
};

template <typename T>
int64_t multiply_rows(const LineEncoder& encoder, const ScaledRows& in, int64_t first, int64_t last,
                      LineGradient* out, int64_t& wrong_out) {
  const int64_t* const offsets = in.offsets;  // in registers
  const int64_t* const rows = in.rows;
  const int32_t* const source = in.source;
  const int32_t* const shards = in.shards;
  const auto num_rows = static_cast<uint64_t>(in.num_rows);
  const auto num_ids = static_cast<uint64_t>(in.num_ids);
  WantedRows wanted;
  int size = 0;
  int64_t written = 0;
  int64_t wrong = -1;
  for (int64_t sample = first; sample < last; ++sample) {
    for (int64_t f = 0; f < in.num_wanted; ++f) {
      const int64_t bag = sample * in.num_features + in.features[f];
      const int64_t end = offsets[bag + 1];
      for (int64_t m = offsets[bag]; m < end; ++m) {
        // Numbers below 0 are large ones here.
        const auto row = static_cast<uint64_t>(rows[m]);
        const auto id = static_cast<uint64_t>(static_cast<int64_t>(source[m]));
        const bool fits = (row < num_rows) & (id < num_ids);
        wrong = fits ? wrong : m;
        wanted.at[size] = m;
        wanted.bags[size] = bag;
        // No condition, as in encode_keys.
        size += static_cast<int>(fits) & static_cast<int>(shards[fits ? id : 0] >= 0);
        if (size < WantedRows::kMost) continue;
        wanted.multiply<T>(encoder, in, size, out + written);
        written += size;
        size = 0;
      }
    }
  }
  if (size > 0) wanted.multiply<T>(encoder, in, size, out + written);
  if (wrong >= 0) wrong_out = wrong;
  return written + size;
}

int64_t line_gradients(const LineEncoder& encoder, const ScaledRows& in, int64_t first,
                       int64_t last, LineGradient* out, int64_t& wrong) {
  const auto run = in.half ? multiply_rows<uint16_t> : multiply_rows<float>;
  return run(encoder, in, first, last, out, wrong);
}

void place_lines(LineGradient* added, int64_t size, RowPlaces& places_in) {
  constexpr int64_t kAhead = 16;
  RowPlaces places = places_in;  // in registers
  const auto ask = [&](int64_t i) __attribute__((always_inline)) {
    if (i < size) __builtin_prefetch(places.slots + places.first_slot(added[i].line), 1);
  };
  for (int64_t i = 0; i < kAhead; ++i) ask(i);
  for (int64_t i = 0; i < size; ++i) {
    ask(i + kAhead);
    bool is_new;
    added[i].line = static_cast<int32_t>(places.find(added[i].line, is_new));
  }
  places_in = places;
}

int64_t add_to_lines(const LineGradient* added, int64_t size, int64_t seen_in, float* sums) {
  auto seen = static_cast<int32_t>(seen_in);
  for (int64_t i = 0; i < size; ++i) {
    float* line = sums + added[i].line * int64_t{kLineWeights};
    // Places are given in the order of first hits. No condition, as in RowPlaces.
    const bool is_new = added[i].line == seen;
    seen += is_new;
    LineBits before;
    std::memcpy(&before, line, sizeof(before));
    before &= is_new ? 0u : ~0u;
    const Floats gradient = added[i].gradient - Floats{};
    LineBits bits = reinterpret_cast<LineBits>(gradient);
    keep(added[i].mask, bits);
    const Floats after = reinterpret_cast<Floats>(before) + reinterpret_cast<Floats>(bits);
    std::memcpy(line, &after, sizeof(after));
  }
  return seen;
}

}  // namespace
}  // namespace torchrec_cafe
