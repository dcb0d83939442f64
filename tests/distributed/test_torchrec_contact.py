"""Every upstream name that is not promised to us still exists and means what we think."""

import inspect
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_lookup import (
    GroupedEmbeddingsLookup,
    GroupedPooledEmbeddingsLookup,
)
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import (
    RwPooledEmbeddingSharding,
    RwSparseFeaturesDist,
)
from torchrec.distributed.sharding.tw_sequence_sharding import TwSequenceEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist
from torchrec.distributed.train_pipeline.runtime_forwards import PrefetchPipelinedForward

from tests.distributed import sequences
from torchrec_cafe.distributed import _torchrec
from torchrec_cafe.distributed.dense_source import DenseSource, RowRangeReader
from torchrec_cafe.tables import RowRangeTBE


def source(thing: object) -> str:
    return inspect.getsource(thing)  # pyright: ignore[reportArgumentType]


def test_every_name_is_exported():
    for name in _torchrec.__all__:
        assert hasattr(_torchrec, name), name


def test_attributes_that_we_read_or_set():
    assert "self._lookups" in source(ShardedEmbeddingBagCollection)
    assert "self._embedding_bag_configs" in source(ShardedEmbeddingBagCollection.input_dist)
    assert "self._env: ShardingEnv = env" in source(ShardedEmbeddingBagCollection) or (
        "self._env = env" in source(ShardedEmbeddingBagCollection)
    )
    assert "self._is_weighted" in source(ShardedEmbeddingBagCollection)
    assert "self._pooling_type_to_rs_features" in source(ShardedEmbeddingBagCollection.input_dist)
    assert "self._grouped_embedding_configs" in source(TwPooledEmbeddingSharding.create_lookup)
    assert "self._emb_modules" in source(GroupedPooledEmbeddingsLookup.__init__)
    assert "zch_bucketize_row_pos," in source(RwSparseFeaturesDist.forward)
    assert "self._grouped_embedding_configs" in source(RwPooledEmbeddingSharding.create_lookup)
    assert "self._sharded_module_order_overwrite" in source(EmbeddingBagCollectionSharder.shard)


def test_pipelines_do_what_ours_relies_on():
    pipeline = PrefetchTrainPipelineSparseDist
    assert "self._pipelined_modules" in source(pipeline.start_sparse_data_dist)
    assert "fused_splits_awaitables" in source(pipeline.wait_sparse_data_dist)
    assert "input_dist_tensors_requests[name]" in source(pipeline.wait_sparse_data_dist)
    assert "self._set_module_context(self.contexts[0])" in source(pipeline.dequeue_batch)
    forward = source(PrefetchPipelinedForward.__call__)
    assert "module_input_post_prefetch.pop(self._name)" in forward
    assert "module_contexts_post_prefetch.pop(self._name)" in forward
    assert "self._stream_context(self._prefetch_stream)" in source(pipeline._prefetch)
    assert "current_stream().wait_stream(" in forward
    assert "data.record_stream(cur_stream)" in forward
    assert "lookup.flush()" in source(ShardedEmbeddingBagCollection)
    assert "lookup.purge()" in source(ShardedEmbeddingBagCollection)
    assert "self._feature_splits" in source(GroupedPooledEmbeddingsLookup.forward)
    assert "self._grouped_embedding_configs_per_rank[self._rank]" in source(
        TwRwPooledEmbeddingSharding.create_lookup
    )


def test_methods_that_we_override_are_called():
    assert "self.create_grouped_sharding_infos(" in source(ShardedEmbeddingBagCollection.__init__)
    assert "self.create_embedding_bag_sharding(" in source(ShardedEmbeddingBagCollection.__init__)
    assert "self._create_embedding_kernel(" in source(GroupedPooledEmbeddingsLookup.__init__)
    assert "self.plan," in source(EmbeddingShardingPlanner.collective_plan)
    assert "split_optimizer_states()" in source(RowRangeTBE.get_optimizer_state)


def test_sequences_do_what_ours_rely_on():
    sharded = source(ShardedEmbeddingCollection.__init__)
    assert "self._embedding_configs" in sharded
    assert "self.create_grouped_sharding_infos(" in sharded
    assert "self.create_embedding_sharding(" in sharded
    assert "self._create_embedding_kernel(" in source(GroupedEmbeddingsLookup.__init__)
    assert "config, pg, device" in source(GroupedEmbeddingsLookup.__init__)
    for sharding in (RwSequenceEmbeddingSharding, TwSequenceEmbeddingSharding):
        assert "grouped_configs=self._grouped_embedding_configs" in source(sharding.create_lookup)
    assert "is_sequence=True" in source(RwSequenceEmbeddingSharding.create_input_dist)
    assert "isinstance(input_dist, RwSparseFeaturesDist)" in source(
        ShardedEmbeddingCollection.input_dist
    )
    assert "self._use_index_dedup" in source(EmbeddingCollectionSharder.__init__)
    assert "lookup.flush()" in source(ShardedEmbeddingCollection)
    assert "lookup.purge()" in source(ShardedEmbeddingCollection)
    collection = sequences.collection(need_indices=True)
    options = _torchrec.sequence_options(collection)
    assert options["need_indices"] is True
    assert set(options) < set(dir(collection))


def test_fused_params_reach_the_kernel():
    signature = inspect.signature(ShardedEmbeddingBagCollection.create_grouped_sharding_infos)
    assert list(signature.parameters)[:4] == [
        "module",
        "table_name_to_parameter_sharding",
        "prefix",
        "fused_params",
    ]


def test_dcp_reads_what_rows_are_read_from(tmp_path):
    """A reader of ranges finds the values of a saved tensor without DCP."""
    folder = str(tmp_path / "checkpoint")
    table = torch.arange(40.0).view(10, 4)
    turned = torch.arange(12.0).view(3, 4).t()  # its values do not lie row by row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        dcp.save({"table": table, "turned": turned, "row": table[:, 1]}, checkpoint_id=folder)
    reader = RowRangeReader(folder)
    source = DenseSource(reader)
    assert torch.equal(source.rows("table", 3, 7), table[3:7])
    assert torch.equal(source.rows("row", 2, 9), table[2:9, 1])
    assert torch.equal(source.rows("turned", 1, 3), turned[1:3])
    found = {index.fqn: saved is not None for index, saved in reader._saved.items()}
    assert found == {"table": True, "row": True, "turned": False}
    (saved,) = (saved for index, saved in reader._saved.items() if index.fqn == "table")
    assert saved is not None
    for file in (tmp_path / "checkpoint").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: saved.start + 8])
    with pytest.raises(ValueError, match="must hold 'table' in full, but ends before"):
        source.rows("table", 0, 10)
