"""Which tables of a model share a budget, a TBE and a pool."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ShardingType
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingCollection

from torchrec_cafe.config import Lookahead, MemRec, TableKind, TableShape, item_bytes
from torchrec_cafe.distributed._torchrec import ranks_of_a_host
from torchrec_cafe.distributed.constraints import ParameterConstraints
from torchrec_cafe.distributed.embedding import EmbeddingCollectionSharder, refuse_dedup
from torchrec_cafe.distributed.embedding_bag import EmbeddingBagCollectionSharder
from torchrec_cafe.distributed.optimizers import check_optimizer
from torchrec_cafe.distributed.sharded_collection import OwnSharder
from torchrec_cafe.distributed.table_collections import (
    COLLECTIONS,
    Collection,
    TableConfig,
    configs_of,
    module_of,
    pooling_of,
)
from torchrec_cafe.distributed.types import CompressedGroup, sequence_sharding_types

#: The group of each table that has one, by collection (its ``id``) and name.
Groups = dict[int, dict[str, CompressedGroup]]


def collections_of(module: nn.Module, sharders: Sequence[Any]) -> list[tuple[str, Collection]]:
    """The collections of a model that can have tables with a kind, by path.

    Those inside modules that are sharded as a whole (towers, feature processors) are not among
    them: TorchRec's planner does not look into these either.

    Args:
        module: the model.
        sharders: whatever will shard it.
    """
    sharded = {sharder.module_type for sharder in sharders} | set(COLLECTIONS)
    found: dict[int, tuple[str, Collection]] = {}
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    while waiting:
        path, child = waiting.pop(0)
        if isinstance(child, COLLECTIONS) and type(child) in COLLECTIONS:
            found.setdefault(id(child), (path, child))
        if type(child) not in sharded:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, of) for name, of in child.named_children()]
    return list(found.values())


def default_sharders() -> list[Any]:
    """TorchRec's default sharders, with ours for collections that can have tables with a kind."""
    others = [s for s in get_default_sharders() if s.module_type not in COLLECTIONS]
    return [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder(), *others]


def sharder_of(sharders: Sequence[Any], collection: Collection) -> Any:
    """The sharder of this package for a collection among a planner's; ``None`` if it has none.

    Args:
        sharders: whatever will shard the model.
        collection: of the model.
    """
    for sharder in sharders:
        if isinstance(sharder, OwnSharder) and isinstance(collection, sharder.module_type):
            return sharder
    return None


def needed_sharder(sharders: Sequence[Any], collection: Collection, reason: str) -> Any:
    """The sharder of this package for a collection among a planner's.

    Args:
        sharders: whatever will shard the model.
        collection: of the model.
        reason: why there must be one, for the message.

    Raises:
        ValueError: if there is none.
    """
    sharder = sharder_of(sharders, collection)
    if sharder is None:
        raise ValueError(
            f"{reason}, so `sharders` must hold a torchrec_cafe.{type(collection).__name__}Sharder"
            f", got {[type(sharder).__name__ for sharder in sharders]}"
        )
    return sharder


def own_sharder(sharders: Sequence[Any], reason: str) -> EmbeddingBagCollectionSharder:
    """The sharder of this package for pooled bags among a planner's.

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


def table_shape(config: TableConfig) -> TableShape:
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
        sharders: must hold the sharders of this package for the collections of these tables.
        constraints: of the tables that have a kind.
        topology: of the plan.

    Raises:
        ValueError: naming the table, if it is unknown, has no sharder that can compress it, an
            optimizer or pooling that it cannot have, or no row left.
    """
    groups: Groups = {}
    found: dict[str, str] = {}
    for path, collection in collections_of(module, sharders):
        names = sorted(constraints.keys() & {config.name for config in configs_of(collection)})
        if not names:
            continue
        ours = needed_sharder(sharders, collection, f"tables {names} are compressed")
        if isinstance(ours, EmbeddingCollectionSharder):
            refuse_dedup(ours, names)
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
            f"constraints compress tables {unknown}, which no EmbeddingBagCollection or "
            "EmbeddingCollection of the model has; check the names"
        )
    return groups


def _group_collection(
    collection: Collection,
    constraints: Mapping[str, ParameterConstraints],
    topology: Topology,
    fused_params: dict[str, Any] | None,
) -> dict[str, CompressedGroup]:
    members: dict[tuple[Any, ...], list[TableConfig]] = {}
    for config in configs_of(collection):
        constraint = constraints.get(config.name)
        if constraint is None or constraint.table is None:
            continue
        check_table(collection, config, constraint, topology.compute_device, fused_params)
        key = (
            constraint.table,
            constraint.sharding_type(),
            config.embedding_dim,
            config.data_type,
            pooling_of(config),
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
    collection: Collection,
    config: TableConfig,
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
    if isinstance(collection, EmbeddingCollection):
        _check_sequence(config.name, kind, constraint.sharding_type())
    else:
        _check_pooling(config, kind, is_weighted=collection.is_weighted())
    if constraint.sharding_type() != ShardingType.DATA_PARALLEL.value:  # a dense optimizer's
        check_optimizer(config.name, module_of(collection, config.name), fused_params, device)


def _of_tbe(
    collection: Collection,
    config: TableConfig,
    constraint: ParameterConstraints,
) -> tuple[str, ...]:
    """What all tables of a TBE have in common besides their shape: optimizer and options."""
    weight = module_of(collection, config.name).weight
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


def _check_sequence(name: str, kind: TableKind, sharding_type: str) -> None:
    """Refuse what a table of an ``EmbeddingCollection`` cannot be."""
    if isinstance(kind, Lookahead):
        raise ValueError(
            f"table {name!r}: Lookahead tables must be in an EmbeddingBagCollection, got one in an "
            "EmbeddingCollection; use Cafe or another kind, or look ids up in bags of one"
        )
    if isinstance(kind, MemRec) and kind.per == "sample":
        raise ValueError(
            f"table {name!r}: an id of an EmbeddingCollection must have a vector of its own, got "
            "MemRec(per='sample'); use MemRec(per='token')"
        )
    possible = sequence_sharding_types(kind)
    if sharding_type not in possible:
        raise ValueError(
            f"table {name!r}: a {type(kind).__name__} table of an EmbeddingCollection can be "
            f"sharded {' or '.join(possible)}, got sharding_types={[sharding_type]}; leave "
            "sharding_types out"
        )


def _check_pooling(config: TableConfig, kind: TableKind, *, is_weighted: bool) -> None:
    if not isinstance(kind, MemRec) or kind.per == "token":
        return
    pooling = pooling_of(config)
    if is_weighted or pooling is not PoolingType.SUM:
        got = "weighted features" if is_weighted else f"pooling={pooling}"
        raise ValueError(
            f"table {config.name!r}: MemRec(per='sample') must have unweighted features pooled by "
            f"SUM, got {got}; use MemRec(per='token')"
        )
