"""The sharding plan with compressed tables: constraints and planner."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner as TorchRecPlanner
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_cafe.config import Lookahead, MemRec, TableKind, TableShape, item_bytes
from torchrec_cafe.distributed._torchrec import TorchRecConstraints
from torchrec_cafe.distributed.embedding_bag import EmbeddingBagCollectionSharder
from torchrec_cafe.distributed.optimizers import check_optimizer
from torchrec_cafe.distributed.types import (
    CompressedGroup,
    CompressedParameterSharding,
    CompressedTable,
    physical_kernel,
    sharding_types,
)


@dataclasses.dataclass
class ParameterConstraints(TorchRecConstraints):
    """TorchRec's constraints of a table, and how the table is kept.

    Attributes:
        table: a :class:`torchrec_cafe.Cafe` or another kind; ``None`` leaves the table to
            TorchRec, as ever.
    """

    table: TableKind | None = None

    def __hash__(self) -> int:
        """TorchRec hashes constraints to recognise a plan's inputs."""
        return hash((super().__hash__(), self.table))


class _PlanningSharder(EmbeddingBagCollectionSharder):
    """The user's sharder as the planner should see it: compressed tables at their size."""

    def __init__(
        self,
        sharder: EmbeddingBagCollectionSharder,
        groups: dict[int, dict[str, CompressedGroup]],
        compute_device: str,
    ) -> None:
        super().__init__(sharder.fused_params, sharder.qcomm_codecs_registry)
        self._sharder = sharder
        self._groups = groups
        self._compute_device = compute_device

    def shardable_parameters(self, module: EmbeddingBagCollection) -> dict[str, nn.Parameter]:
        parameters = super().shardable_parameters(module)
        for name, group in self._groups.get(id(module), {}).items():
            old = parameters[name]
            rows = planned_rows(
                group, name, old.shape[1] * old.element_size(), self._compute_device
            )
            weight = torch.empty((rows, old.shape[1]), dtype=old.dtype, device="meta")
            parameters[name] = nn.Parameter(weight)
        return parameters

    def sharding_types(self, compute_device_type: str) -> list[str]:
        # On CPU TorchRec leaves row-wise sharding out, although gloo has every collective it needs.
        types = super().sharding_types(compute_device_type)
        needed = {group.sharding_type for of in self._groups.values() for group in of.values()}
        return types + sorted(needed - set(types))


def planned_rows(
    group: CompressedGroup, name: str, row_bytes: int, compute_device: str = "cpu"
) -> int:
    """Rows of a fused table that takes as many bytes as the table and its part of the pool.

    Rows of the pool, sketch, maps and weights are divided between the tables in proportion to their
    ids, so that the estimates of a group add up to its cost; of a pool that stays on one rank, all
    is the first table's.

    Args:
        group: the table's group.
        name: of the table.
        row_bytes: bytes of a row.
        compute_device: ``"cpu"`` or ``"cuda"``; look-ahead tables take the memory of a GPU for
            their slots only.
    """
    table = group.table(name)
    if group.looks_ahead:
        share = table.num_ids / sum(other.num_ids for other in group.tables)
        slots = max(1, round(group.resident_bytes * share / row_bytes))
        in_file = isinstance(group.kind, Lookahead) and group.kind.path is not None
        return slots if compute_device != "cpu" or in_file else slots + table.num_ids
    shared = sum(other.shared_rows for other in group.tables)
    besides = group.resident_bytes / row_bytes - shared
    if group.stays_together:  # the first table stands for all, which follow it to its rank
        return max(1, round(shared + besides)) if table == group.tables[0] else 1
    tracked = [t for t in group.tables if t.index >= 0]
    if table.index < 0 or not tracked:
        return table.shared_rows
    share = table.num_ids / sum(t.num_ids for t in tracked)
    return max(1, table.shared_rows + round(besides * share))


class EmbeddingShardingPlanner(TorchRecPlanner):
    """Drop-in for TorchRec's planner that knows compressed tables.

    Every argument keeps TorchRec's meaning; tables without ``table=`` are planned by TorchRec,
    unchanged. Compressed tables are estimated at their compressed size. The caller's objects are
    not modified.

    Args:
        args: TorchRec's arguments; ``constraints`` may hold :class:`ParameterConstraints`.
        kwargs: the same, by name.

    Raises:
        ValueError: if a compressed table is constrained to what it cannot do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check the constraints; see the class."""
        arguments = (
            inspect.signature(TorchRecPlanner.__init__).bind(self, *args, **kwargs).arguments
        )
        constraints: dict[str, Any] | None = arguments.get("constraints")
        self._kinds: dict[str, TableKind] = {}
        self._sharding_types: dict[str, str] = {}
        adapted: dict[str, TorchRecConstraints] = {}
        for name, constraint in (constraints or {}).items():
            adapted[name] = constraint
            if isinstance(constraint, ParameterConstraints) and constraint.table is not None:
                _check_constraint(name, constraint)
                self._kinds[name] = constraint.table
                self._sharding_types[name] = _sharding_type(constraint)
                adapted[name] = dataclasses.replace(
                    constraint,
                    sharding_types=[self._sharding_types[name]],
                    compute_kernels=[physical_kernel(self._sharding_types[name])],
                )
        # Enumerator and estimators keep a reference to this dictionary, which is ours.
        self._adapted = adapted
        arguments = {name: value for name, value in arguments.items() if name != "self"}
        super().__init__(**(arguments | {"constraints": adapted}))

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Plan on one process; :meth:`collective_plan` broadcasts rank 0's plan.

        Args:
            module: the model.
            sharders: must hold an :class:`EmbeddingBagCollectionSharder` of this package if a
                table is compressed.

        Raises:
            ValueError: naming the table, if a compressed table is unknown, has no sharder that
                can compress it, or has no row left.
        """
        if not self._kinds:
            return super().plan(module, sharders)
        groups = self._group_tables(module, sharders)
        planned = super().plan(module, self._planning_sharders(module, sharders, groups))
        collections = {path: groups[id(child)] for path, child in _collections(module)}
        for path, module_plan in planned.plan.items():
            tables = cast(EmbeddingModuleShardingPlan, module_plan)
            for name, group in collections.get(path, {}).items():
                # Where a pool stays together, its tables follow the first.
                first = tables[group.tables[0].name] if group.stays_together else tables[name]
                tables[name] = _compressed_sharding(name, group, tables[name], first)
        return planned

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Plan on rank 0 and broadcast; as TorchRec's, with our sharder as the default.

        Args:
            module: the model.
            sharders: as in :meth:`plan`.
            pg: process group of the plan.
        """
        if self._kinds:
            if sharders is None:
                ours: Any = EmbeddingBagCollectionSharder()
                sharders = [ours]
            # A refusal has to reach every rank: the others would wait for rank 0's plan forever.
            self._group_tables(module, sharders)
        return super().collective_plan(module, sharders, pg)

    def _group_tables(
        self, module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]]
    ) -> dict[int, dict[str, CompressedGroup]]:
        """The group of each compressed table, by collection (``id``) and table."""
        ours = [s for s in sharders if isinstance(s, EmbeddingBagCollectionSharder)]
        if not ours:
            raise ValueError(
                f"tables {sorted(self._kinds)} are compressed, so `sharders` must hold a "
                "torchrec_cafe.EmbeddingBagCollectionSharder, got "
                f"{[type(sharder).__name__ for sharder in sharders]}"
            )
        groups: dict[int, dict[str, CompressedGroup]] = {}
        found: set[str] = set()
        for _, collection in _collections(module):
            grouped = self._group_collection(collection)
            for name, group in grouped.items():
                if group.sharding_type == ShardingType.DATA_PARALLEL.value:
                    continue  # the dense optimizer trains it
                check_optimizer(
                    name,
                    collection.embedding_bags[name],
                    ours[0].fused_params,
                    self._topology.compute_device,
                )
            groups[id(collection)] = grouped
            found |= grouped.keys()
        unknown = sorted(self._kinds.keys() - found)
        if unknown:
            raise ValueError(
                f"constraints compress tables {unknown}, which no EmbeddingBagCollection of the "
                "model has; check the names"
            )
        return groups

    def _group_collection(self, collection: EmbeddingBagCollection) -> dict[str, CompressedGroup]:
        members: dict[tuple[Any, ...], list[EmbeddingBagConfig]] = {}
        for config in collection.embedding_bag_configs():
            kind = self._kinds.get(config.name)
            if kind is not None:
                _check_device(config.name, kind, self._topology.compute_device)
                _check_pooling(config, kind, is_weighted=collection.is_weighted())
                key = (
                    kind,
                    self._sharding_types[config.name],
                    config.embedding_dim,
                    config.data_type,
                    config.pooling,
                )
                members.setdefault(key, []).append(config)
        result: dict[str, CompressedGroup] = {}
        for number, ((kind, sharding_type, *_), configs) in enumerate(members.items()):
            shapes = [
                TableShape(
                    name=config.name,
                    num_embeddings=config.num_embeddings,
                    embedding_dim=config.embedding_dim,
                    item_bytes=item_bytes(config.data_type),
                )
                for config in configs
            ]
            group = CompressedGroup.from_allocation(
                f"{type(kind).__name__.lower()}_pool_{number}",
                kind,
                sharding_type,
                {config.name: config.num_embeddings for config in configs},
                kind.allocate(shapes),
            )
            if group.has_pool and sharding_type == ShardingType.ROW_WISE.value:
                group.shard_bounds(self._topology.world_size)  # refuse too many ranks now
            result |= {config.name: group for config in configs}
        return result

    def _planning_sharders(
        self,
        module: nn.Module,
        sharders: Sequence[ModuleSharder[nn.Module]],
        groups: dict[int, dict[str, CompressedGroup]],
    ) -> list[Any]:
        for _, collection in _collections(module):
            for config in collection.embedding_bag_configs():
                constraint = self._adapted.get(config.name, TorchRecConstraints())
                if config.name not in self._kinds and not constraint.sharding_types:
                    # What the planning sharder adds is for compressed tables only.
                    types = EmbeddingBagCollectionSharder().sharding_types(
                        self._topology.compute_device
                    )
                    types = [t for t in types if t != ShardingType.GRID_SHARD.value]
                    self._adapted[config.name] = dataclasses.replace(
                        constraint, sharding_types=types
                    )
        return [
            _PlanningSharder(sharder, groups, self._topology.compute_device)
            if isinstance(sharder, EmbeddingBagCollectionSharder)
            else sharder
            for sharder in sharders
        ]


def _collections(module: nn.Module) -> list[tuple[str, EmbeddingBagCollection]]:
    return [
        (path, child)
        for path, child in module.named_modules()
        if type(child) is EmbeddingBagCollection
    ]


def _sharding_type(constraint: ParameterConstraints) -> str:
    """How a compressed table is sharded: the first way that it can be and its constraint allows."""
    assert constraint.table is not None
    possible = sharding_types(constraint.table)
    allowed = constraint.sharding_types or possible
    return next(sharding_type for sharding_type in possible if sharding_type in allowed)


def _check_constraint(name: str, constraint: ParameterConstraints) -> None:
    assert constraint.table is not None
    types, possible = constraint.sharding_types, sharding_types(constraint.table)
    if types is not None and not set(types) & set(possible):
        raise ValueError(
            f"table {name!r}: a {type(constraint.table).__name__} table can be sharded "
            f"{' or '.join(possible)}, got sharding_types={types}; "
            "leave sharding_types out or leave the table uncompressed"
        )
    kernels = constraint.compute_kernels
    allowed = {
        physical_kernel(_sharding_type(constraint)),
        EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value,
    }
    if kernels is not None and not set(kernels) & allowed:
        raise ValueError(
            f"table {name!r}: the compute kernel of a compressed table is its own, got "
            f"compute_kernels={kernels}; leave compute_kernels out"
        )


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


def _compressed_sharding(
    name: str, group: CompressedGroup, planned: ParameterSharding, where: ParameterSharding
) -> CompressedParameterSharding:
    """The plan's entry on the ranks of another, with rows cut where the virtual shards are."""
    values = {f: getattr(planned, f) for f in ParameterSharding.__dataclass_fields__}
    values |= {
        "compute_kernel": EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value,
        "ranks": where.ranks,
        "sharding_spec": _spec(group, group.table(name), planned, where),
    }
    return CompressedParameterSharding(**values, group=group)


def _spec(
    group: CompressedGroup,
    table: CompressedTable,
    planned: ParameterSharding,
    where: ParameterSharding,
) -> EnumerableShardingSpec | None:
    if where.sharding_spec is None:  # replicas
        return None
    old = cast(EnumerableShardingSpec, where.sharding_spec).shards
    dim = cast(EnumerableShardingSpec, planned.sharding_spec).shards[0].shard_sizes[1]
    rows = group.row_bounds(table, len(old))
    return EnumerableShardingSpec(
        [
            ShardMetadata(
                shard_offsets=[begin, 0],
                shard_sizes=[end - begin, dim],
                placement=shard.placement,
            )
            for begin, end, shard in zip(rows[:-1], rows[1:], old, strict=True)
        ]
    )
