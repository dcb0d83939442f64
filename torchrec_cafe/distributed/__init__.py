"""Compressed tables in a TorchRec sharding plan."""

from torchrec_cafe.distributed.embedding_bag import (
    EmbeddingBagCollectionSharder,
    ShardedCompressedEmbeddingBagCollection,
    pool_statistics,
    resident_bytes,
)
from torchrec_cafe.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec_cafe.distributed.types import (
    CompressedGroup,
    CompressedParameterSharding,
    CompressedTable,
)

__all__ = [
    "CompressedGroup",
    "CompressedParameterSharding",
    "CompressedTable",
    "EmbeddingBagCollectionSharder",
    "EmbeddingShardingPlanner",
    "ParameterConstraints",
    "ShardedCompressedEmbeddingBagCollection",
    "pool_statistics",
    "resident_bytes",
]
