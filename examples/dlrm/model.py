"""The model of the example: TorchRec's own DLRM, its tables planned by kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

import torchrec_cafe as tc
from examples.dlrm.config import CUSTOM, EXACT_KINDS, TrainConfig
from examples.dlrm.data import ClickLog
from examples.dlrm.tables_file import read_table_constraints
from torchrec_cafe.config import TableKind, TableShape

_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


def constraints(
    config: TrainConfig, log: ClickLog, kind: str, compression: float
) -> dict[str, tc.ParameterConstraints]:
    """How each table is kept: the whole difference between the kinds.

    Args:
        config: options of the run.
        log: the data set.
        kind: of :data:`examples.dlrm.config.KINDS`.
        compression: of the compressed kinds.
    """
    if kind == CUSTOM:
        return read_table_constraints(Path(config.tables), table_shapes(config, log))
    cafe = config.cafe_arguments()
    single_level: dict[str, Any] = cafe | {"medium_fraction": 0.0}
    kinds: dict[str, Callable[[], Any]] = {
        "full": lambda: None,
        "hash": lambda: tc.Hash(compression=compression),
        "hash_whole": lambda: tc.Hash(compression=compression, whole_fraction=0.25),
        "quotient_remainder": lambda: tc.QuotientRemainder(compression=compression),
        "cafe": lambda: tc.Cafe(compression=compression, **cafe),
        "cafe_single_level": lambda: tc.Cafe(compression=compression, **single_level),
        "lookahead": lambda: tc.Lookahead(**config.lookahead_arguments()),
        "mem_rec": lambda: tc.MemRec(compression=compression, **config.mem_rec_arguments()),
    }
    table = kinds[kind]()
    # Table-wise keeps every stock table's optimizer fused, as the compressed ones' is; tables that
    # look ahead then start from the same weights, and end at the same.
    stock = ["table_wise"] if kind in EXACT_KINDS else None
    return {
        f"t_{feature.name}": tc.ParameterConstraints(table=table, sharding_types=stock)
        for feature in log.features
    }


def table_shapes(config: TrainConfig, log: ClickLog) -> list[TableShape]:
    """The uncompressed tables, for dividing a budget.

    Args:
        config: options of the run.
        log: the data set.
    """
    return [
        TableShape(
            name=f"t_{feature.name}",
            num_embeddings=feature.num_embeddings,
            embedding_dim=config.embedding_dim,
        )
        for feature in log.features
    ]


def memory_of(
    config: TrainConfig, log: ClickLog, tables: Mapping[str, tc.ParameterConstraints]
) -> dict[str, int]:
    """Bytes of all tables by part, as planned.

    Args:
        config: options of the run.
        log: the data set.
        tables: how each table is kept, see :func:`constraints`.

    Returns:
        By field of :class:`torchrec_cafe.MemoryBreakdown`; plain tables count as shared rows.

    Raises:
        ValueError: if a compression leaves no row, naming the largest that works.
    """
    groups: defaultdict[TableKind | None, list[TableShape]] = defaultdict(list)
    for shape in table_shapes(config, log):
        kept = tables.get(shape.name)
        groups[kept.table if kept is not None else None].append(shape)
    memory: Counter[str] = Counter()
    for kind, shapes in groups.items():
        if kind is None:
            dense = sum(shape.dense_bytes for shape in shapes)
            memory.update({"shared_bytes": dense, "dense_bytes": dense})
        else:
            memory.update(asdict(kind.allocate(shapes).memory))
    return {field.name: memory[field.name] for field in fields(tc.MemoryBreakdown)}


def check_budgets(config: TrainConfig, log: ClickLog) -> None:
    """Refuse a compression that leaves no row, before anything is trained.

    Args:
        config: options of the run.
        log: the data set.

    Raises:
        ValueError: naming the largest compression that works.
    """
    for kind in config.kinds:
        for compression in config.compression:
            memory_of(config, log, constraints(config, log, kind, compression))


def build_dlrm(config: TrainConfig, log: ClickLog) -> DLRMTrain:
    """TorchRec's DLRM, its tables on the meta device.

    Args:
        config: options of the run.
        log: the data set.
    """
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature.name}",
            feature_names=[feature.name],
            num_embeddings=feature.num_embeddings,
            embedding_dim=config.embedding_dim,
        )
        for feature in log.features
    ]
    arguments: dict[str, Any] = {
        "embedding_bag_collection": EmbeddingBagCollection(
            tables=tables, device=torch.device("meta")
        ),
        "dense_in_features": log.num_dense,
        "dense_arch_layer_sizes": [64, config.embedding_dim],
        "over_arch_layer_sizes": [*config.over_arch, 1],
    }
    if config.arch == "dcn":
        return DLRMTrain(DLRM_DCN(**arguments, dcn_num_layers=2, dcn_low_rank_dim=32))
    return DLRMTrain(DLRM(**arguments))


def shard(
    config: TrainConfig,
    log: ClickLog,
    tables: Mapping[str, tc.ParameterConstraints],
    device: torch.device,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Plan, shard, and give the dense layers their optimizer.

    Args:
        config: options of the run.
        log: the data set.
        tables: how each table is kept, see :func:`constraints`.
        device: CPU or this rank's GPU.
    """
    model: nn.Module = build_dlrm(config, log)
    planner = tc.EmbeddingShardingPlanner(
        topology=Topology(
            world_size=dist.get_world_size(), compute_device=device.type, ddr_cap=64 * 2**30
        ),
        constraints=dict(tables),
        batch_size=config.batch_size,
        storage_reservation=FixedPercentageStorageReservation(0.1),
        stats=NoopEmbeddingStats(),
        debug=False,
    )
    sharders: list[Any] = [
        tc.EmbeddingBagCollectionSharder(
            fused_params={
                "optimizer": _OPTIMIZERS[config.optimizer],
                "learning_rate": config.learning_rate,
            }
        )
    ]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, plan=plan, sharders=sharders, device=device)
    dense = KeyedOptimizerWrapper(
        {name: p for name, p in sharded.named_parameters() if "embedding_bags" not in name},
        lambda parameters: torch.optim.Adam(parameters, lr=config.dense_learning_rate),
    )
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])
