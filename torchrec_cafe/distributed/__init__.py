"""Compressed tables in a TorchRec sharding plan."""

from torchrec_cafe.distributed.embedding_bag import (
    EmbeddingBagCollectionSharder,
    ShardedCompressedEmbeddingBagCollection,
)
from torchrec_cafe.distributed.pipeline import LookaheadTrainPipeline
from torchrec_cafe.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec_cafe.distributed.statistics import (
    lookahead_statistics,
    pool_statistics,
    resident_bytes,
)
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
    "LookaheadTrainPipeline",
    "ParameterConstraints",
    "ShardedCompressedEmbeddingBagCollection",
    "lookahead_statistics",
    "pool_statistics",
    "resident_bytes",
]
