"""Every upstream name that is not promised to us still exists and means what we think."""

import inspect

from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.sharding.rw_sharding import (
    RwPooledEmbeddingSharding,
    RwSparseFeaturesDist,
)
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding

from torchrec_cafe.distributed import _torchrec
from torchrec_cafe.tables import RowRangeTBE


def source(thing: object) -> str:
    return inspect.getsource(thing)  # pyright: ignore[reportArgumentType]


def test_every_name_is_exported():
    for name in _torchrec.__all__:
        assert hasattr(_torchrec, name), name


def test_attributes_that_we_read_or_set():
    assert "self._lookups" in source(ShardedEmbeddingBagCollection)
    assert "self._embedding_bag_configs" in source(ShardedEmbeddingBagCollection.input_dist)
    assert "self._pooling_type_to_rs_features" in source(ShardedEmbeddingBagCollection.input_dist)
    assert "self._grouped_embedding_configs" in source(TwPooledEmbeddingSharding.create_lookup)
    assert "self._emb_modules" in source(GroupedPooledEmbeddingsLookup.__init__)
    assert "zch_bucketize_row_pos," in source(RwSparseFeaturesDist.forward)
    assert "self._grouped_embedding_configs" in source(RwPooledEmbeddingSharding.create_lookup)
    assert "self._sharded_module_order_overwrite" in source(EmbeddingBagCollectionSharder.shard)


def test_methods_that_we_override_are_called():
    assert "self.create_grouped_sharding_infos(" in source(ShardedEmbeddingBagCollection.__init__)
    assert "self.create_embedding_bag_sharding(" in source(ShardedEmbeddingBagCollection.__init__)
    assert "self._create_embedding_kernel(" in source(GroupedPooledEmbeddingsLookup.__init__)
    assert "self.plan," in source(EmbeddingShardingPlanner.collective_plan)
    assert "split_optimizer_states()" in source(RowRangeTBE.get_optimizer_state)


def test_fused_params_reach_the_kernel():
    signature = inspect.signature(ShardedEmbeddingBagCollection.create_grouped_sharding_infos)
    assert list(signature.parameters)[:4] == [
        "module",
        "table_name_to_parameter_sharding",
        "prefix",
        "fused_params",
    ]
