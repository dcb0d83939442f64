// A batch of bags, and the encodings of its ids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bloom.h"
#include "cpu/kernels.h"
#include "cpu/offsets.h"
#include "cpu/tensors.h"

namespace torchrec_cafe {

// Below this many ids per thread, starting the threads costs more than they save.
constexpr int64_t kIdsPerThread = 2048;

// The ids of a batch, feature-major.
struct Batch {
  const int64_t* ids;
  const int64_t* offsets;
  int64_t num_features;
  int64_t batch_size;
  std::vector<Table> tables;

  Batch(const Tensor& ids_in, const Tensor& offsets_in, const Tensor& tables_in)
      : ids(ids_in.const_data_ptr<int64_t>()),
        offsets(offsets_in.const_data_ptr<int64_t>()),
        num_features(tables_in.size(0)),
        batch_size((offsets_in.numel() - 1) / num_features) {
    check_offsets(offsets, offsets_in.numel(), ids_in.numel());
    check_table_values(tables_in);
    for (int64_t f = 0; f < num_features; ++f) {
      tables.push_back(Table::load(tables_in.const_data_ptr<int64_t>(), f));
    }
  }

  // Calls run(feature, first id, end) for each feature's part of the ids [begin, end).
  template <typename Run>
  void each_feature(int64_t begin, int64_t end, const Run& run) const {
    for (int64_t f = 0; f < num_features; ++f) {
      const int64_t first = std::max(begin, offsets[f * batch_size]);
      const int64_t last = std::min(end, offsets[(f + 1) * batch_size]);
      if (first < last) run(tables[f], first, last);
    }
  }
};

// Samples that have about kIdsPerThread ids.
inline int64_t samples_per_block(const Batch& batch, int64_t num_ids) {
  const int64_t per_sample = 1 + num_ids / std::max<int64_t>(1, batch.batch_size);
  return std::max<int64_t>(1, kIdsPerThread / per_sample);
}

// Calls run(id, bits of the block, place in it) for the ids [begin, end) of a feature, in order.
template <typename Run>
void each_encoded(const Batch& batch, const BloomEncoder& encoder, const Table& table,
                  int64_t begin, int64_t end, const Run& run) {
  BloomBits bits;
  for (int64_t from = begin; from < end; from += kBloomBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBloomBlock, end - from));
    kernels().bloom_encode(encoder, table, batch.ids + from, size, bits);
    for (int i = 0; i < size; ++i) run(from + i, bits, i);
  }
}

// The bits of the ids of samples [begin, end), which are encoded feature by feature and read sample
// by sample.
class EncodedSamples {
 public:
  EncodedSamples(const Batch& batch, const BloomEncoder& encoder, int64_t begin, int64_t end)
      : place_(batch.num_features) {
    const int hashes = encoder.num_hashes;
    for (int64_t f = 0; f < batch.num_features; ++f) {
      const int64_t* bags = batch.offsets + f * batch.batch_size;
      place_[f] = static_cast<int64_t>(bits_.size()) - bags[begin] * hashes;
      bits_.resize(bits_.size() + (bags[end] - bags[begin]) * hashes);
      int32_t* to = bits_.data() + place_[f];
      each_encoded(batch, encoder, batch.tables[f], bags[begin], bags[end],
                   [&](int64_t id, const BloomBits& bits, int i) {
                     for (int h = 0; h < hashes; ++h) to[id * hashes + h] = bits.at[h][i];
                   });
    }
  }

  // Element id * num_hashes + h is the bit of hash function h, or -1 if an earlier one has set it.
  const int32_t* of(int64_t feature) const { return bits_.data() + place_[feature]; }

 private:
  std::vector<int64_t> place_;
  std::vector<int32_t> bits_;
};

}  // namespace torchrec_cafe
