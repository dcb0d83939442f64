"""Compressed tables in a TorchRec sharding plan."""

from torchrec.distributed.planner.types import PlannerError

from torchrec_cafe.distributed.checkpoint_manager import CheckpointManager
from torchrec_cafe.distributed.constraints import ParameterConstraints
from torchrec_cafe.distributed.conversion import convert
from torchrec_cafe.distributed.delta import DeltaTracker
from torchrec_cafe.distributed.dense_export import DenseSavePlanner, dense_state_dict
from torchrec_cafe.distributed.embedding import (
    EmbeddingCollectionSharder,
    ShardedCompressedEmbeddingCollection,
)
from torchrec_cafe.distributed.embedding_bag import (
    EmbeddingBagCollectionSharder,
    ShardedCompressedEmbeddingBagCollection,
)
from torchrec_cafe.distributed.gathered import gather_tables
from torchrec_cafe.distributed.inference import to_inference
from torchrec_cafe.distributed.load_checks import CheckedLoadPlanner
from torchrec_cafe.distributed.option import BudgetError
from torchrec_cafe.distributed.pipeline import LookaheadTrainPipeline
from torchrec_cafe.distributed.plan_report import PlannedRow, PlanReport
from torchrec_cafe.distributed.planner import EmbeddingShardingPlanner
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
    "BudgetError",
    "CheckedLoadPlanner",
    "CheckpointManager",
    "CompressedGroup",
    "CompressedParameterSharding",
    "CompressedTable",
    "DeltaTracker",
    "DenseSavePlanner",
    "EmbeddingBagCollectionSharder",
    "EmbeddingCollectionSharder",
    "EmbeddingShardingPlanner",
    "LookaheadTrainPipeline",
    "ParameterConstraints",
    "PlanReport",
    "PlannedRow",
    "PlannerError",
    "ShardedCompressedEmbeddingBagCollection",
    "ShardedCompressedEmbeddingCollection",
    "convert",
    "dense_state_dict",
    "gather_tables",
    "lookahead_statistics",
    "pool_statistics",
    "resident_bytes",
    "to_inference",
]
