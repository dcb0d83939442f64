// Schemas of every operator. torchrec_cafe/ops documents them; cpu/ and cuda/ implement them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torchrec_cafe, m) {
  m.def("advise_huge_pages(Tensor tensor) -> ()");
  m.def(
      "mix_ids(Tensor ids, Tensor feature_offsets, Tensor num_embeddings, Tensor(a!) out_of_range)"
      " -> Tensor");
  m.def(
      "remap(Tensor ids, Tensor offsets, Tensor tables, Tensor buckets, int first_shard,"
      " int num_shards, int hot_rows_per_shard, int rows_per_shard, int hot_offset,"
      " bool with_source)"
      " -> (Tensor rows, Tensor out_offsets, Tensor source, Tensor keys, Tensor shards,"
      " Tensor second, Tensor cold_shards)");
  m.def(
      "observe(Tensor keys, Tensor shards, Tensor importance, Tensor(a!) buckets,"
      " Tensor(b!) inflation, Tensor(c!) counters, float growth) -> ()");
  m.def(
      "learn(Tensor grad, Tensor offsets, Tensor keys, Tensor shards, Tensor? weights,"
      " Tensor features, Tensor(a!) norms, Tensor(b!) buckets, Tensor(c!) inflation,"
      " Tensor(d!) counters, float decay, float growth) -> ()");
  m.def(
      "learn_scaled(Tensor grad, Tensor offsets, Tensor keys, Tensor shards, Tensor? weights,"
      " Tensor features, Tensor(a!) norms, Tensor(b!) buckets, Tensor(c!) inflation,"
      " Tensor(d!) counters, float decay, float growth, Tensor table, Tensor rows,"
      " Tensor bag_offsets, Tensor source, Tensor taught, int weights_per_shard, int num_hashes)"
      " -> (Tensor rows, Tensor grads)");
  m.def(
      "rebalance(Tensor selected, Tensor(a!) buckets, Tensor(b!) owners, Tensor inflation,"
      " Tensor(c!) counters, float min_score, float hysteresis, int num_medium)"
      " -> (Tensor actions, Tensor new_keys)");
  m.def(
      "move_rows(Tensor(a!) rows, Tensor actions, Tensor new_keys, Tensor selected, Tensor tables,"
      " int rows_per_shard, int hot_offset, float second_factor) -> ()");
  m.def(
      "add_second_rows(Tensor rows, Tensor offsets, Tensor source, Tensor second, int hot_offset)"
      " -> (Tensor rows, Tensor offsets, Tensor source)");
  m.def(
      "quotient_remainder(Tensor ids, Tensor offsets, Tensor tables)"
      " -> (Tensor rows, Tensor offsets, Tensor source)");
  m.def(
      "bloom_rows(Tensor ids, Tensor offsets, Tensor tables, int first_shard, int shards_held,"
      " int rows_per_shard, int num_hashes) -> (Tensor rows, Tensor offsets, Tensor source)");
  m.def(
      "key_factors(Tensor weights, Tensor keys, Tensor shards, int num_hashes,"
      " Tensor? source=None) -> Tensor");
  m.def(
      "factor_gradients(Tensor grad, Tensor table, Tensor rows, Tensor offsets, Tensor source,"
      " Tensor keys, Tensor shards, Tensor? given, Tensor features, int shards_held,"
      " int weights_per_shard, int num_hashes) -> (Tensor rows, Tensor grads)");
  m.def(
      "bloom_union(Tensor ids, Tensor offsets, Tensor tables, int first_shard, int shards_held,"
      " int bits_per_shard, int num_hashes, int first_pair) -> (Tensor bits, Tensor offsets)");
  m.def(
      "bloom_pool(Tensor rows, Tensor weights, Tensor ids, Tensor offsets, Tensor tables,"
      " Tensor per_sample_weights, int first_shard, int num_hashes, int num_weight_hashes)"
      " -> Tensor");
  m.def(
      "bloom_weigh(Tensor weights, Tensor ids, Tensor offsets, Tensor tables, int first_shard,"
      " int num_hashes) -> Tensor");
  m.def(
      "bloom_weigh_backward(Tensor grad, Tensor rows, Tensor ids, Tensor offsets, Tensor tables,"
      " Tensor per_sample_weights, int first_shard, int shards_held, int weights_per_shard,"
      " int num_hashes, int num_weight_hashes) -> (Tensor rows, Tensor grads)");
  m.def(
      "pool_keys(Tensor ids, Tensor offsets, Tensor ranges, Tensor(a!) out_of_range)"
      " -> (Tensor keys, Tensor offsets, Tensor source)");
  m.def(
      "announce_rows(Tensor keys, Tensor(a!) entries, Tensor(b!) queue, Tensor(c!) counters,"
      " int number) -> (Tensor rows, Tensor positions)");
  m.def(
      "plan_slots(Tensor rows, Tensor(a!) entries, Tensor(b!) queue, Tensor(c!) counters,"
      " Tensor(d!) slots, Tensor(e!) free, int oldest, bool urgent, bool train)"
      " -> (Tensor found, Tensor fill_rows, Tensor fill_slots, Tensor spill_rows,"
      " Tensor spill_slots, int shortage)");
  m.def("slots_of_occurrences(Tensor found, Tensor positions) -> Tensor");
  m.def("retract_rows(Tensor rows, Tensor(a!) entries, Tensor queue, Tensor(b!) counters) -> ()");
  m.def("release_slots(Tensor held, Tensor(a!) slots) -> ()");
  m.def(
      "postpone_rows(Tensor rows, Tensor held, Tensor(a!) entries, Tensor queue, Tensor counters,"
      " Tensor(b!) slots, Tensor free) -> ()");
  m.def(
      "grow_slot_map(Tensor entries, Tensor queue, Tensor counters, Tensor(a!) new_entries,"
      " Tensor(b!) new_queue, Tensor(c!) new_counters) -> ()");
  m.def("copy_rows(Tensor(a!) into, Tensor into_rows, Tensor source, Tensor rows) -> ()");
  m.def(
      "read_rows(int file, Tensor rows, Tensor(a!) into, Tensor into_rows, int num_threads) -> ()");
  m.def(
      "write_rows(int file, Tensor rows, Tensor source, Tensor source_rows, int num_threads)"
      " -> ()");
}
