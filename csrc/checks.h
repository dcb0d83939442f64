// Checks that every registered implementation makes first, so that no call of torch.ops can touch
// memory out of bounds. torchrec_cafe/ops says in the caller's words what was refused. Names in
// backticks are of what it cannot see itself: values.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "bloom.h"
#include "factor_lines.h"
#include "hot_sketch.h"
#include "row_map.h"

namespace torchrec_cafe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, int64_t dim) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// The dispatcher lets tensors of several devices through.
template <typename... Tensors>
void check_device(const Tensor& first, const Tensors&... others) {
  const auto same = [&](const Tensor& other) {
    return other.is_cuda() == first.is_cuda() &&
           other.get_device_index() == first.get_device_index();
  };
  STD_TORCH_CHECK((same(others) && ...), "all tensors must be on one device");
}

// What an operator writes must be nobody else's: it would change its own input on the way. All are
// contiguous.
template <typename... Tensors>
void check_apart(const Tensor& written, const char* name, const Tensors&... others) {
  const auto end_of = [](const Tensor& tensor) {
    return static_cast<const char*>(tensor.data_ptr()) + tensor.numel() * tensor.element_size();
  };
  const auto is_apart = [&](const Tensor& other) {
    return written.numel() == 0 || other.numel() == 0 || end_of(written) <= other.data_ptr() ||
           end_of(other) <= written.data_ptr();
  };
  STD_TORCH_CHECK((is_apart(others) && ...), "`", name,
                  "` must share no memory with other arguments; clone it");
}

inline void check_mix_ids(const Tensor& ids, const Tensor& feature_offsets,
                          const Tensor& num_embeddings, const Tensor& out_of_range) {
  check_tensor(ids, "ids", ScalarType::Long, 1);
  check_tensor(feature_offsets, "feature_offsets", ScalarType::Long, 1);
  check_tensor(num_embeddings, "num_embeddings", ScalarType::Long, 1);
  check_tensor(out_of_range, "out_of_range", ScalarType::Long, 1);
  check_device(ids, feature_offsets, num_embeddings, out_of_range);
  STD_TORCH_CHECK(feature_offsets.numel() == num_embeddings.numel() + 1,
                  "feature_offsets must have one element more than num_embeddings");
  STD_TORCH_CHECK(out_of_range.numel() == num_embeddings.numel(),
                  "out_of_range must have as many elements as num_embeddings");
  check_apart(out_of_range, "out_of_range", ids, feature_offsets, num_embeddings);
}

inline void check_buckets(const Tensor& buckets) {
  check_tensor(buckets, "buckets", ScalarType::Long, 3);
  STD_TORCH_CHECK(buckets.size(2) * 8 == sizeof(Bucket), "buckets must be [shards, buckets, ",
                  sizeof(Bucket) / 8, "]");
  STD_TORCH_CHECK(buckets.size(1) < (int64_t{1} << 32),
                  "`buckets` must be fewer than 2**32 a shard");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(buckets.data_ptr()) % alignof(Bucket) == 0,
                  "`buckets` must begin at a multiple of ", alignof(Bucket), " bytes; clone it");
}

// Positions and bags are 32-bit.
inline void check_count(int64_t count, const char* name) {
  STD_TORCH_CHECK(count < (int64_t{1} << 31), name, " must have fewer than 2**31 elements");
}

// A product of two sizes, which might overflow.
inline void check_count(int64_t parts, int64_t of_part, const char* name) {
  constexpr int64_t kMost = int64_t{1} << 31;
  STD_TORCH_CHECK(
      parts == 0 || of_part == 0 || (parts < kMost && of_part < kMost && parts * of_part < kMost),
      "`", name, "` must be fewer than 2**31, got ", parts, " times ", of_part);
}

// Ids of the bags of a batch, and a row of `tables` for each feature.
inline void check_bags(const Tensor& ids, const Tensor& offsets, const Tensor& tables) {
  check_tensor(ids, "ids", ScalarType::Long, 1);
  check_tensor(offsets, "offsets", ScalarType::Long, 1);
  check_tensor(tables, "tables", ScalarType::Long, 2);
  check_device(ids, offsets, tables);
  check_count(ids.numel(), "ids");
  check_count(offsets.numel(), "offsets");
  STD_TORCH_CHECK(tables.size(1) == kTableColumns, "tables must have ", kTableColumns, " columns");
  STD_TORCH_CHECK(tables.size(0) > 0, "tables must have at least one row");
  STD_TORCH_CHECK(offsets.numel() > 0 && (offsets.numel() - 1) % tables.size(0) == 0,
                  "offsets must have features * batch + 1 elements");
}

inline void check_remap(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                        const Tensor& buckets, int64_t num_shards, const PoolRows& pool) {
  check_bags(ids, offsets, tables);
  check_buckets(buckets);
  check_device(ids, buckets);
  STD_TORCH_CHECK(num_shards >= 0 && num_shards <= 65536, "num_shards must be in [0, 65536]");
  STD_TORCH_CHECK(pool.hot_rows_per_shard >= 0 && pool.rows_per_shard >= pool.hot_rows_per_shard,
                  "`rows_per_shard` must be at least the hot rows of a shard");
  check_count(buckets.size(0), pool.rows_per_shard, "rows_per_shard");
}

inline void check_statistics(const Tensor& buckets, const Tensor& inflation,
                             const Tensor& counters) {
  check_buckets(buckets);
  check_tensor(inflation, "inflation", ScalarType::Double, 1);
  check_tensor(counters, "counters", ScalarType::Long, 2);
  check_device(buckets, inflation, counters);
  STD_TORCH_CHECK(inflation.size(0) == buckets.size(0), "inflation must be [shards]");
  STD_TORCH_CHECK(counters.size(0) == buckets.size(0) && counters.size(1) == kCounters,
                  "counters must be [shards, ", static_cast<int>(kCounters), "]");
}

inline void check_observe(const Tensor& keys, const Tensor& shards, const Tensor& importance,
                          const Tensor& buckets, const Tensor& inflation, const Tensor& counters) {
  check_tensor(keys, "keys", ScalarType::Long, 1);
  check_tensor(shards, "shards", ScalarType::Int, 1);
  check_tensor(importance, "importance", ScalarType::Float, 1);
  check_count(keys.numel(), "keys");
  STD_TORCH_CHECK(shards.numel() == keys.numel() && importance.numel() == keys.numel(),
                  "keys, shards and importance must have the same length");
  check_statistics(buckets, inflation, counters);
  check_device(keys, shards, importance, buckets);
  STD_TORCH_CHECK(buckets.size(0) == 0 || buckets.size(1) > 0, "buckets must not be empty");
  check_apart(buckets, "buckets", keys, shards, importance, inflation, counters);
  check_apart(inflation, "inflation", keys, shards, importance, counters);
  check_apart(counters, "counters", keys, shards, importance);
}

inline void check_bags_of_features(const Tensor& grad, const Tensor& features) {
  STD_TORCH_CHECK(features.numel() > 0 && grad.size(0) % features.numel() == 0,
                  "grad must be [samples * features, dim]");
}

// A number for each key.
inline void check_of_keys(const Tensor& values, const char* name, const Tensor& keys) {
  check_tensor(values, name, ScalarType::Float, 1);
  check_device(keys, values);
  STD_TORCH_CHECK(values.numel() == keys.numel(), "`", name, "` must be as long as `keys`");
}

// What learning writes shares no memory with what it reads.
template <typename... Tensors>
void check_apart_from_learned(const Tensor& norms, const Tensor& buckets, const Tensor& inflation,
                              const Tensor& counters, const Tensors&... others) {
  check_apart(norms, "norms", others...);
  check_apart(buckets, "buckets", others...);
  check_apart(inflation, "inflation", others...);
  check_apart(counters, "counters", others...);
}

inline void check_learn(const Tensor& grad, const Tensor& offsets, const Tensor& keys,
                        const Tensor& shards, const std::optional<Tensor>& weights,
                        const Tensor& features, const Tensor& norms, const Tensor& buckets,
                        const Tensor& inflation, const Tensor& counters) {
  check_tensor(grad, "grad", ScalarType::Float, 2);
  check_tensor(offsets, "offsets", ScalarType::Long, 1);
  check_tensor(keys, "keys", ScalarType::Long, 1);
  check_tensor(shards, "shards", ScalarType::Int, 1);
  if (weights) check_of_keys(*weights, "weights", keys);
  check_tensor(features, "features", ScalarType::Long, 1);
  check_tensor(norms, "norms", ScalarType::Double, 3);
  check_count(keys.numel(), "keys");
  check_count(grad.size(0), "grad");
  STD_TORCH_CHECK(shards.numel() == keys.numel(), "keys and shards must have the same length");
  STD_TORCH_CHECK(offsets.numel() == grad.size(0) + 1, "offsets must have a number for each bag");
  check_bags_of_features(grad, features);
  STD_TORCH_CHECK(grad.size(1) % 4 == 0, "grad must have a multiple of 4 columns");
  check_statistics(buckets, inflation, counters);
  STD_TORCH_CHECK(norms.size(0) == buckets.size(0) && norms.size(2) == 2,
                  "norms must be [shards, tables, 2]");
  check_device(grad, offsets, keys, shards, features, norms, buckets);
  STD_TORCH_CHECK(buckets.size(0) == 0 || buckets.size(1) > 0, "buckets must not be empty");
  check_apart_from_learned(norms, buckets, inflation, counters, grad, offsets, keys, shards,
                           features);
  if (weights) check_apart_from_learned(norms, buckets, inflation, counters, *weights);
  check_apart(norms, "norms", buckets, inflation, counters);
  check_apart(buckets, "buckets", inflation, counters);
  check_apart(inflation, "inflation", counters);
}

inline void check_move_rows(const Tensor& rows, const Tensor& actions, const Tensor& new_keys,
                            const Tensor& selected, const Tensor& tables, int64_t rows_per_shard) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float ||
                      rows.scalar_type() == ScalarType::Half ||
                      rows.scalar_type() == ScalarType::BFloat16,
                  "rows has the wrong dtype");
  STD_TORCH_CHECK(rows.dim() >= 1 && rows.is_contiguous(), "rows must be contiguous");
  check_tensor(actions, "actions", ScalarType::Char, 2);
  check_tensor(new_keys, "new_keys", ScalarType::Long, 2);
  check_tensor(selected, "selected", ScalarType::Long, 1);
  check_tensor(tables, "tables", ScalarType::Long, 2);
  check_device(rows, actions, new_keys, selected, tables);
  STD_TORCH_CHECK(actions.size(0) == selected.numel() && new_keys.size(0) == selected.numel() &&
                      actions.size(1) == new_keys.size(1),
                  "actions and new_keys must be [selected, hot rows]");
  STD_TORCH_CHECK(tables.size(1) == kTableColumns, "tables must have ", kTableColumns, " columns");
  STD_TORCH_CHECK(rows_per_shard >= actions.size(1),
                  "`rows_per_shard` must be at least the hot rows of a shard");
  check_apart(rows, "rows", actions, new_keys, selected, tables);
}

inline void check_second_rows(const Tensor& rows, const Tensor& offsets, const Tensor& source,
                              const Tensor& second) {
  check_tensor(rows, "rows", ScalarType::Long, 1);
  check_tensor(offsets, "offsets", ScalarType::Long, 1);
  check_tensor(source, "source", ScalarType::Int, 1);
  check_tensor(second, "second", ScalarType::Int, 1);
  check_device(rows, offsets, source, second);
  check_count(2 * rows.numel(), "twice rows");
  STD_TORCH_CHECK(second.numel() == rows.numel(), "rows and second must have the same length");
  STD_TORCH_CHECK(source.numel() == 0 || source.numel() == rows.numel(),
                  "source must be empty or as long as rows");
  STD_TORCH_CHECK(offsets.numel() > 0, "`offsets` must have at least one element");
}

inline void check_quotient_remainder(const Tensor& ids, const Tensor& offsets,
                                     const Tensor& tables) {
  check_bags(ids, offsets, tables);
  check_count(2 * ids.numel(), "twice ids");
}

inline void check_bloom(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                        int64_t shards_held, int64_t bits_per_shard, int64_t num_hashes) {
  check_bags(ids, offsets, tables);
  STD_TORCH_CHECK(num_hashes >= 1 && num_hashes <= kMaxHashes, "`num_hashes` must be in [1, ",
                  kMaxHashes, "], got ", num_hashes);
  STD_TORCH_CHECK(shards_held >= 0 && bits_per_shard >= 1,
                  "`shards_held` must be at least 0, and rows or weights of a shard at least 1");
  STD_TORCH_CHECK(shards_held > 0 || ids.numel() == 0, "`ids` must be empty on a rank of no shard");
  check_count(shards_held, bits_per_shard, "the rows or weights of a rank");
  check_count(num_hashes * ids.numel(), "num_hashes times ids");
}

inline void check_weights_per_shard(int64_t weights_per_shard) {
  STD_TORCH_CHECK(weights_per_shard % kWeightsPerRow == 0,
                  "`weights` must have a multiple of 4 columns, got ", weights_per_shard);
}

// Keys of ids and the shards of this rank that they are in, -1 for those that have no weights.
inline void check_keys(const Tensor& keys, const Tensor& shards, int64_t shards_held,
                       int64_t weights_per_shard, int64_t num_hashes) {
  check_tensor(keys, "keys", ScalarType::Long, 1);
  check_tensor(shards, "shards", ScalarType::Int, 1);
  check_device(keys, shards);
  STD_TORCH_CHECK(keys.numel() == shards.numel(), "`shards` must have as many elements as `keys`, ",
                  keys.numel(), ", got ", shards.numel());
  STD_TORCH_CHECK(num_hashes >= 1 && num_hashes <= kMaxLineHashes, "`num_hashes` must be in [1, ",
                  kMaxLineHashes, "], got ", num_hashes);
  STD_TORCH_CHECK(shards_held >= 0 && weights_per_shard >= 1,
                  "`shards_held` must be at least 0, and the weights of a shard at least 1");
  STD_TORCH_CHECK(weights_per_shard % kLineWeights == 0, "`weights` must have a multiple of ",
                  kLineWeights, " columns, got ", weights_per_shard);
  check_count(shards_held, weights_per_shard, "the weights of a rank");
  check_count(keys.numel(), "keys");
}

inline void check_key_factors(const Tensor& weights, const Tensor& keys, const Tensor& shards,
                              int64_t num_hashes, const std::optional<Tensor>& source) {
  check_tensor(weights, "weights", ScalarType::Float, 2);
  check_keys(keys, shards, weights.size(0), weights.size(1), num_hashes);
  check_device(weights, keys);
  if (!source) return;
  check_tensor(*source, "source", ScalarType::Int, 1);
  check_device(keys, *source);
}

inline void check_factor_gradients(const Tensor& grad, const Tensor& table, const Tensor& rows,
                                   const Tensor& offsets, const Tensor& source, const Tensor& keys,
                                   const Tensor& shards, const std::optional<Tensor>& given,
                                   const Tensor& features) {
  check_tensor(grad, "grad", ScalarType::Float, 2);
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Float || table.scalar_type() == ScalarType::Half,
      "table must be float32 or float16");
  check_tensor(table, "table", table.scalar_type(), 2);
  check_tensor(rows, "rows", ScalarType::Long, 1);
  check_tensor(offsets, "offsets", ScalarType::Long, 1);
  check_tensor(source, "source", ScalarType::Int, 1);
  check_tensor(keys, "keys", ScalarType::Long, 1);
  if (given) check_of_keys(*given, "given", keys);
  check_tensor(features, "features", ScalarType::Long, 1);
  check_device(grad, table, rows, offsets, source, keys, shards, features);
  check_bags_of_features(grad, features);
  STD_TORCH_CHECK(grad.size(0) == offsets.numel() - 1 && grad.size(1) == table.size(1),
                  "`grad` must have a row for each bag, and the columns of `table`");
  STD_TORCH_CHECK(source.numel() == rows.numel(), "`source` must be as long as `rows`");
}

inline void check_bloom_union(const Tensor& ids, const Tensor& offsets, const Tensor& tables,
                              int64_t shards_held, int64_t bits_per_shard, int64_t num_hashes,
                              int64_t first_pair) {
  check_bloom(ids, offsets, tables, shards_held, bits_per_shard, num_hashes);
  STD_TORCH_CHECK(first_pair == kTokenPairs || first_pair == kWeightPairs,
                  "`first_pair` must be that of token rows or of weights, got ", first_pair);
}

inline void check_bloom_weights(const Tensor& weights, const Tensor& ids, const Tensor& offsets,
                                const Tensor& tables, int64_t num_hashes) {
  check_tensor(weights, "weights", ScalarType::Float, 2);
  check_bloom(ids, offsets, tables, weights.size(0), weights.size(1), num_hashes);
  check_device(weights, ids);
  check_weights_per_shard(weights.size(1));
}

inline int64_t rows_per_shard(const Tensor& rows, int64_t shards_held) {
  return shards_held == 0 ? 1 : rows.size(0) / shards_held;
}

inline void check_token_rows(const Tensor& rows, const Tensor& ids, const Tensor& offsets,
                             const Tensor& tables, const Tensor& per_sample_weights,
                             int64_t shards_held, int64_t num_hashes) {
  const bool half = rows.scalar_type() == ScalarType::Half;
  check_tensor(rows, "rows", half ? ScalarType::Half : ScalarType::Float, 2);
  check_tensor(per_sample_weights, "per_sample_weights", ScalarType::Float, 1);
  check_device(rows, ids, per_sample_weights);
  STD_TORCH_CHECK(
      shards_held == 0 || (rows.size(0) >= shards_held && rows.size(0) % shards_held == 0),
      "`rows` must be as many in each shard, got ", rows.size(0), " for ", shards_held);
  check_bloom(ids, offsets, tables, shards_held, rows_per_shard(rows, shards_held), num_hashes);
  STD_TORCH_CHECK(per_sample_weights.numel() == 0 || per_sample_weights.numel() == ids.numel(),
                  "per_sample_weights must be empty or as long as ids");
}

inline void check_bloom_backward(const Tensor& grad, const Tensor& rows, const Tensor& ids,
                                 const Tensor& offsets, const Tensor& tables,
                                 const Tensor& per_sample_weights, int64_t shards_held,
                                 int64_t weights_per_shard, int64_t num_hashes,
                                 int64_t num_weight_hashes) {
  check_bloom(ids, offsets, tables, shards_held, weights_per_shard, num_weight_hashes);
  check_weights_per_shard(weights_per_shard);
  check_token_rows(rows, ids, offsets, tables, per_sample_weights, shards_held, num_hashes);
  check_tensor(grad, "grad", ScalarType::Float, 2);
  check_device(grad, ids);
  STD_TORCH_CHECK(grad.size(0) == offsets.numel() - 1 && grad.size(1) == rows.size(1),
                  "grad must be [samples * features, columns of rows]");
}

inline void check_rebalance(const Tensor& selected, const Tensor& buckets, const Tensor& owners,
                            const Tensor& inflation, const Tensor& counters) {
  check_tensor(selected, "selected", ScalarType::Long, 1);
  check_statistics(buckets, inflation, counters);
  check_tensor(owners, "owners", ScalarType::Int, 2);
  check_device(selected, buckets, owners);
  STD_TORCH_CHECK(owners.size(0) == buckets.size(0), "owners must be [shards, hot rows]");
  check_apart(buckets, "buckets", selected, owners, inflation, counters);
  check_apart(owners, "owners", selected, inflation, counters);
  check_apart(counters, "counters", selected, inflation);
}

}  // namespace torchrec_cafe
