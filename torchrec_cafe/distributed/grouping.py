"""Which tables of a model share a budget, a TBE and a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ModuleSharder, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_cafe.config import Lookahead, MemRec, TableKind, TableShape, item_bytes
from torchrec_cafe.distributed._torchrec import ranks_of_a_host
from torchrec_cafe.distributed.constraints import ParameterConstraints
from torchrec_cafe.distributed.embedding_bag import EmbeddingBagCollectionSharder
from torchrec_cafe.distributed.optimizers import check_optimizer
from torchrec_cafe.distributed.types import CompressedGroup

#: The group of each table that has one, by collection (its ``id``) and name.
Groups = dict[int, dict[str, CompressedGroup]]


def collections_of(module: nn.Module) -> list[tuple[str, EmbeddingBagCollection]]:
    """The collections of a model that can have tables with a kind, by path."""
    return [
        (path, child)
        for path, child in module.named_modules()
        if type(child) is EmbeddingBagCollection
    ]


def table_shape(config: EmbeddingBagConfig) -> TableShape:
    """The shape of a table, uncompressed."""
    return TableShape(
        name=config.name,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        item_bytes=item_bytes(config.data_type),
    )


def group_tables(
    module: nn.Module,
    sharders: Sequence[ModuleSharder[nn.Module]],
    constraints: Mapping[str, ParameterConstraints],
    topology: Topology,
) -> Groups:
    """Group the tables of a model, and refuse what cannot be.

    Args:
        module: the model.
        sharders: must hold an :class:`EmbeddingBagCollectionSharder` of this package.
        constraints: of the tables that have a kind.
        topology: of the plan.

    Raises:
        ValueError: naming the table, if it is unknown, has no sharder that can compress it, an
            optimizer or pooling that it cannot have, or no row left.
    """
    ours = [s for s in sharders if isinstance(s, EmbeddingBagCollectionSharder)]
    if not ours:
        raise ValueError(
            f"tables {sorted(constraints)} are compressed, so `sharders` must hold a "
            "torchrec_cafe.EmbeddingBagCollectionSharder, got "
            f"{[type(sharder).__name__ for sharder in sharders]}"
        )
    groups: Groups = {}
    found: set[str] = set()
    for _, collection in collections_of(module):
        grouped = _group_collection(collection, constraints, topology)
        for name, group in grouped.items():
            if group.sharding_type == ShardingType.DATA_PARALLEL.value:
                continue  # the dense optimizer trains it
            bag, fused_params = collection.embedding_bags[name], ours[0].fused_params
            check_optimizer(name, bag, fused_params, topology.compute_device)
        groups[id(collection)] = grouped
        found |= grouped.keys()
    unknown = sorted(constraints.keys() - found)
    if unknown:
        raise ValueError(
            f"constraints compress tables {unknown}, which no EmbeddingBagCollection of the "
            "model has; check the names"
        )
    return groups


def _group_collection(
    collection: EmbeddingBagCollection,
    constraints: Mapping[str, ParameterConstraints],
    topology: Topology,
) -> dict[str, CompressedGroup]:
    members: dict[tuple[Any, ...], list[EmbeddingBagConfig]] = {}
    for config in collection.embedding_bag_configs():
        constraint = constraints.get(config.name)
        if constraint is None or constraint.table is None:
            continue
        check_device(config.name, constraint.table, topology.compute_device)
        _check_pooling(config, constraint.table, is_weighted=collection.is_weighted())
        key = (
            constraint.table,
            constraint.sharding_type(),
            config.embedding_dim,
            config.data_type,
            config.pooling,
        )
        members.setdefault(key, []).append(config)
    result: dict[str, CompressedGroup] = {}
    for number, ((kind, sharding_type, *_), configs) in enumerate(members.items()):
        group = CompressedGroup.from_allocation(
            f"{type(kind).__name__.lower()}_pool_{number}",
            kind,
            sharding_type,
            {config.name: config.num_embeddings for config in configs},
            kind.allocate([table_shape(config) for config in configs]),
        )
        if group.has_pool:
            group.shard_bounds(ranks_of_a_table(sharding_type, topology))  # refuse too many now
        result |= {config.name: group for config in configs}
    return result


def ranks_of_a_table(sharding_type: str, topology: Topology) -> int:
    """Over how many ranks a table is spread; 1 if it is not, or replicated."""
    if sharding_type == ShardingType.ROW_WISE.value:
        return topology.world_size
    if sharding_type == ShardingType.TABLE_ROW_WISE.value:
        return ranks_of_a_host(topology)
    return 1


def check_device(name: str, kind: TableKind, device: str) -> None:
    """Refuse a kind that does not run on a device.

    Args:
        name: of the table.
        kind: its kind.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: naming the table and what to do.
    """
    if not isinstance(kind, Lookahead) or device == "cpu":
        return
    if device != "cuda":
        raise ValueError(
            f"table {name!r}: Lookahead tables must be on the CPU or on CUDA, got "
            f"compute_device={device!r}; use another kind of table"
        )
    if kind.path is not None:
        raise ValueError(
            f"table {name!r}: on CUDA the rows of Lookahead tables must be in host memory, got "
            f"path={kind.path!r}; leave path out or train on the CPU"
        )


def _check_pooling(config: EmbeddingBagConfig, kind: TableKind, *, is_weighted: bool) -> None:
    if not isinstance(kind, MemRec) or kind.per == "token":
        return
    if is_weighted or config.pooling is not PoolingType.SUM:
        got = "weighted features" if is_weighted else f"pooling={config.pooling}"
        raise ValueError(
            f"table {config.name!r}: MemRec(per='sample') must have unweighted features pooled by "
            f"SUM, got {got}; use MemRec(per='token')"
        )
