// Schemas of every operator. torchrec_cafe/ops documents them; cpu/ and cuda/ implement them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torchrec_cafe, m) {
  m.def(
      "mix_ids(Tensor ids, Tensor feature_offsets, Tensor num_embeddings, Tensor(a!) out_of_range)"
      " -> Tensor");
  m.def(
      "remap(Tensor ids, Tensor offsets, Tensor tables, Tensor sketch_keys, Tensor sketch_hot_rows,"
      " int first_shard, int num_shards, int num_hot_rows, int hot_offset)"
      " -> (Tensor rows, Tensor out_offsets, Tensor source, Tensor bags, Tensor keys, Tensor "
      "shards)");
  m.def(
      "observe(Tensor keys, Tensor shards, Tensor importance, Tensor(a!) sketch_keys,"
      " Tensor(b!) sketch_scores, Tensor(c!) sketch_hot_rows, Tensor(d!) norms,"
      " Tensor(e!) inflation, Tensor(f!) counters, float growth, float norm_decay) -> ()");
  m.def(
      "rebalance(Tensor selected, Tensor sketch_keys, Tensor sketch_scores,"
      " Tensor(a!) sketch_hot_rows, Tensor(b!) owners, Tensor inflation, Tensor(c!) counters,"
      " float min_score, float hysteresis) -> (Tensor actions, Tensor new_keys)");
}
