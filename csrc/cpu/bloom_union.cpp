// The bits that the ids of a sample set together.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "bit_set.h"
#include "checks.h"
#include "cpu/blocks.h"
#include "cpu/bloom_batch.h"

namespace torchrec_cafe {
namespace {

// Appends the bits of samples [begin, end) to `found`; ends[b] becomes where those of sample b end.
void add_unions(const Batch& batch, const BloomEncoder& encoder, int64_t begin, int64_t end,
                BitSet& set, std::vector<int64_t>& found, int64_t* ends) {
  const int hashes = encoder.num_hashes;
  const EncodedSamples encoded(batch, encoder, begin, end);
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t f = 0; f < batch.num_features; ++f) {
      const int64_t* bag = batch.offsets + f * batch.batch_size + b;
      const int32_t* bits = encoded.of(f);
      for (int64_t i = bag[0] * hashes; i < bag[1] * hashes; ++i) {
        if (bits[i] >= 0) set.insert(bits[i]);
      }
    }
    set.drain([&](int64_t bit) { found.push_back(bit); });
    ends[b] = static_cast<int64_t>(found.size());
  }
}

std::tuple<Tensor, Tensor> bloom_union_cpu(const Tensor& ids, const Tensor& offsets,
                                           const Tensor& tables, int64_t first_shard,
                                           int64_t shards_held, int64_t bits_per_shard,
                                           int64_t num_hashes, int64_t first_pair) {
  check_bloom_union(ids, offsets, tables, shards_held, bits_per_shard, num_hashes, first_pair);
  const Batch batch(ids, offsets, tables);
  const BloomEncoder encoder(first_shard, shards_held, bits_per_shard, num_hashes,
                             static_cast<int>(first_pair));
  const int64_t samples = samples_per_block(batch, ids.numel());
  const int64_t blocks = num_blocks(batch.batch_size, samples);
  Tensor out_offsets = empty_cpu<1>({batch.batch_size + 1}, aoti_torch_dtype_int64());
  int64_t* ends = out_offsets.mutable_data_ptr<int64_t>();
  *ends++ = 0;
  std::vector<std::vector<int64_t>> found(blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    BitSet set(shards_held * bits_per_shard);
    for (int64_t block = begin; block < end; ++block) {
      add_unions(batch, encoder, block * samples, std::min(batch.batch_size, (block + 1) * samples),
                 set, found[block], ends);
    }
  });
  std::vector<int64_t> first(blocks + 1, 0);  // where each block's bits begin
  for (int64_t block = 0; block < blocks; ++block) {
    first[block + 1] = first[block] + static_cast<int64_t>(found[block].size());
  }
  Tensor rows = empty_cpu<1>({first.back()}, aoti_torch_dtype_int64());
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  each_block(batch.batch_size, samples, [&](int64_t block, int64_t begin, int64_t end) {
    std::copy(found[block].begin(), found[block].end(), out + first[block]);
    for (int64_t b = begin; b < end; ++b) ends[b] += first[block];
  });
  return {rows, out_offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("bloom_union", TORCH_BOX(&bloom_union_cpu));
}

}  // namespace torchrec_cafe
