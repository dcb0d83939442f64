"""Which tables of a model share a budget, a TBE and a pool."""

from __future__ import annotations

import functools
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


def collections_of(
    module: nn.Module, sharders: Sequence[Any]
) -> list[tuple[str, EmbeddingBagCollection]]:
    """The collections of a model that can have tables with a kind, by path.

    Those inside modules that are sharded as a whole (towers, feature processors) are not among
    them: TorchRec's planner does not look into these either.

    Args:
        module: the model.
        sharders: whatever will shard it.
    """
    sharded = {sharder.module_type for sharder in sharders} | {EmbeddingBagCollection}
    found: dict[int, tuple[str, EmbeddingBagCollection]] = {}
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    while waiting:
        path, child = waiting.pop(0)
        if type(child) is EmbeddingBagCollection:
            found.setdefault(id(child), (path, child))
        if type(child) not in sharded:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, of) for name, of in child.named_children()]
    return list(found.values())


def own_sharder(sharders: Sequence[Any], reason: str) -> EmbeddingBagCollectionSharder:
    """The sharder of this package among a planner's.

    Args:
        sharders: whatever will shard the model.
        reason: why there must be one, for the message.

    Raises:
        ValueError: if there is none.
    """
    for sharder in sharders:
        if isinstance(sharder, EmbeddingBagCollectionSharder):
            return sharder
    raise ValueError(
        f"{reason}, so `sharders` must hold a torchrec_cafe.EmbeddingBagCollectionSharder, got "
        f"{[type(sharder).__name__ for sharder in sharders]}"
    )


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
    ours = own_sharder(sharders, f"tables {sorted(constraints)} are compressed")
    groups: Groups = {}
    found: dict[str, str] = {}
    for path, collection in collections_of(module, sharders):
        grouped = _group_collection(collection, constraints, topology, ours.fused_params)
        groups[id(collection)] = grouped
        for name in grouped:
            if name in found:
                raise ValueError(
                    f"table {name!r}: two collections have one of that name, {found[name]!r} and "
                    f"{path!r}, and constraints know tables by name; rename one of them"
                )
            found[name] = path
    unknown = sorted(constraints.keys() - found.keys())
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
    fused_params: dict[str, Any] | None,
) -> dict[str, CompressedGroup]:
    members: dict[tuple[Any, ...], list[EmbeddingBagConfig]] = {}
    for config in collection.embedding_bag_configs():
        constraint = constraints.get(config.name)
        if constraint is None or constraint.table is None:
            continue
        check_table(collection, config, constraint, topology.compute_device, fused_params)
        key = (
            constraint.table,
            constraint.sharding_type(),
            config.embedding_dim,
            config.data_type,
            config.pooling,
            *_of_tbe(collection, config, constraint),
        )
        members.setdefault(key, []).append(config)
    result: dict[str, CompressedGroup] = {}
    for (kind, sharding_type, *_), configs in members.items():
        group = CompressedGroup.from_allocation(
            # Checkpoints know the pool by this name, whatever else is in the model.
            f"{type(kind).__name__.lower()}_pool_{configs[0].name}",
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


def check_table(
    collection: EmbeddingBagCollection,
    config: EmbeddingBagConfig,
    constraint: ParameterConstraints,
    device: str,
    fused_params: dict[str, Any] | None,
) -> None:
    """Refuse a table what its kind cannot do.

    Args:
        collection: that has the table.
        config: of the table.
        constraint: has the kind.
        device: ``"cpu"`` or ``"cuda"``.
        fused_params: of the sharder.

    Raises:
        ValueError: naming the table and what to do.
    """
    kind = constraint.table
    assert kind is not None
    if constraint.device_group not in (None, device):
        raise ValueError(
            f"table {config.name!r}: a table with `table=` must be on the device that is planned "
            f"for, {device!r}, got device_group={constraint.device_group!r}; leave one of them out"
        )
    _check_device(config.name, kind, device)
    _check_pooling(config, kind, is_weighted=collection.is_weighted())
    if constraint.sharding_type() != ShardingType.DATA_PARALLEL.value:  # a dense optimizer's
        check_optimizer(config.name, collection.embedding_bags[config.name], fused_params, device)


def _of_tbe(
    collection: EmbeddingBagCollection,
    config: EmbeddingBagConfig,
    constraint: ParameterConstraints,
) -> tuple[str, ...]:
    """What all tables of a TBE have in common besides their shape: optimizer and options."""
    weight = collection.embedding_bags[config.name].weight
    options = (
        getattr(weight, "_optimizer_classes", None),
        getattr(weight, "_optimizer_kwargs", None),
        constraint.bounds_check_mode,
        constraint.stochastic_rounding,
        constraint.output_dtype,
        constraint.enforce_hbm,
    )
    return tuple(map(repr, options))


@functools.lru_cache(maxsize=1 << 16)
def group_alone(kind: TableKind, sharding_type: str, shape: TableShape) -> CompressedGroup:
    """The group of a table that shares nothing with others.

    Args:
        kind: of the table.
        sharding_type: how it is sharded.
        shape: of the uncompressed table.

    Raises:
        ValueError: naming the table, if it has no row left or is too large.
    """
    rows = {shape.name: shape.num_embeddings}
    allocation = kind.allocate([shape])
    return CompressedGroup.from_allocation("alone", kind, sharding_type, rows, allocation)


def _check_device(name: str, kind: TableKind, device: str) -> None:
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
