"""Train an unmodified TorchRec model with embedding tables that do not fit.

Per table, in the sharding plan, a user picks how the table is kept::

    import torchrec_cafe as tc

    constraints = {"t_user": tc.ParameterConstraints(table=tc.Cafe(compression=100))}
    planner = tc.EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    sharders = [tc.EmbeddingBagCollectionSharder(fused_params=...)]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, plan=plan, sharders=sharders, device=device)
"""

from torchrec_cafe._library import load_operators

load_operators(__path__)  # before the modules that register fake kernels

from torchrec_cafe.config import (  # noqa: E402
    Auto,
    Cafe,
    Hash,
    IdStatistics,
    Lookahead,
    MemoryBreakdown,
    MemRec,
    QuotientRemainder,
    load_statistics,
    save_statistics,
)
from torchrec_cafe.distributed import (  # noqa: E402
    CheckedLoadPlanner,
    CheckpointManager,
    DeltaTracker,
    DenseSavePlanner,
    EmbeddingBagCollectionSharder,
    EmbeddingCollectionSharder,
    EmbeddingShardingPlanner,
    LookaheadTrainPipeline,
    ParameterConstraints,
    PlanReport,
    convert,
    dense_state_dict,
    gather_tables,
    lookahead_statistics,
    pool_statistics,
    resident_bytes,
    to_inference,
)
from torchrec_cafe.serving import apply_delta  # noqa: E402
from torchrec_cafe.tables import IdCounts  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Cafe",
    "DeltaTracker",
    "DenseSavePlanner",
    "CheckedLoadPlanner",
    "CheckpointManager",
    "EmbeddingBagCollectionSharder",
    "EmbeddingCollectionSharder",
    "EmbeddingShardingPlanner",
    "Hash",
    "IdCounts",
    "IdStatistics",
    "Lookahead",
    "LookaheadTrainPipeline",
    "MemRec",
    "MemoryBreakdown",
    "ParameterConstraints",
    "PlanReport",
    "QuotientRemainder",
    "apply_delta",
    "convert",
    "dense_state_dict",
    "gather_tables",
    "load_statistics",
    "lookahead_statistics",
    "pool_statistics",
    "resident_bytes",
    "save_statistics",
    "to_inference",
]
