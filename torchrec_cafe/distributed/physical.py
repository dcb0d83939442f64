"""What TorchRec shards in place of a collection: compressed tables at their physical size."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_cafe.distributed._torchrec import sequence_options
from torchrec_cafe.distributed.table_collections import (
    Collection,
    TableConfig,
    configs_of,
    modules_of,
)
from torchrec_cafe.distributed.types import (
    CompressedGroup,
    CompressedParameterSharding,
    physical_kernel,
)


def _pool_config(group: CompressedGroup, like: TableConfig) -> TableConfig:
    """The rows of a pool as a table without features."""
    pooling: dict[str, Any] = {}
    if isinstance(like, EmbeddingBagConfig):
        pooling["pooling"] = like.pooling
    return type(like)(
        name=group.name,
        num_embeddings=group.pool_rows,
        embedding_dim=like.embedding_dim,
        data_type=like.data_type,
        feature_names=[],
        weight_init_min=0.0,
        weight_init_max=0.0,
        init_fn=_init_of_pool(group),
        **pooling,
    )


def _init_of_pool(group: CompressedGroup) -> Callable[[Tensor], Tensor | None]:
    """Hot and second rows are filled when they get an owner; token rows start as any table's."""
    if group.token_rows_per_shard == 0:
        return torch.nn.init.zeros_
    spread = group.pool_rows**-0.5
    return functools.partial(torch.nn.init.uniform_, a=-spread, b=spread)


def _pool_sharding(
    group: CompressedGroup, like: CompressedParameterSharding, dim: int
) -> ParameterSharding:
    """The pool's rows, cut where the virtual shards are."""
    if like.sharding_spec is None:  # replicas
        return _as_physical(like, None)
    spec = cast(EnumerableShardingSpec, like.sharding_spec)
    placements = [shard.placement for shard in spec.shards]
    shards = group.shard_bounds(len(placements))
    rows = [shard * group.pool_rows_per_shard for shard in shards]
    return _as_physical(
        like,
        EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[begin, 0], shard_sizes=[end - begin, dim], placement=placement
                )
                for begin, end, placement in zip(rows[:-1], rows[1:], placements, strict=True)
            ]
        ),
    )


def _as_physical(like: CompressedParameterSharding, spec: Any) -> ParameterSharding:
    """The entry of a physical table in TorchRec's own terms: a table of its size."""
    values = {name: getattr(like, name) for name in ParameterSharding.__dataclass_fields__}
    values |= {"compute_kernel": physical_kernel(like.sharding_type), "sharding_spec": spec}
    return ParameterSharding(**values)


class PhysicalTables:
    """Every compressed table at its physical size, and the pools.

    Args:
        module: the user's collection; not modified.
        plan: the module's plan.

    Attributes:
        configs: the tables, the pools last.
        logical_configs: the same with the tables as the user has them.
        groups: by name of the table or pool, its group; of tables with a kind only.
        pool_names: of the pools.
        plan: of all of them, in TorchRec's own terms.
    """

    def __init__(self, module: Collection, plan: dict[str, ParameterSharding]) -> None:
        """Build the physical configurations; see the class."""
        tables: list[TableConfig] = []
        pools: dict[str, TableConfig] = {}
        self.groups: dict[str, CompressedGroup] = {}
        self.plan: dict[str, ParameterSharding] = {}
        for config in configs_of(module):
            sharding = plan[config.name]
            physical = copy.deepcopy(config)
            self.plan[config.name] = sharding
            if isinstance(sharding, CompressedParameterSharding):
                assert sharding.group is not None
                group = sharding.group
                self.groups[config.name] = group
                # The weights keep the spread of the uncompressed table's (init_fn is set already).
                physical.weight_init_min = config.get_weight_init_min()
                physical.weight_init_max = config.get_weight_init_max()
                physical.num_embeddings = group.table(config.name).shared_rows
                self.plan[config.name] = _as_physical(sharding, sharding.sharding_spec)
                if group.has_pool and group.name not in pools:
                    pools[group.name] = _pool_config(group, config)
                    self.plan[group.name] = _pool_sharding(group, sharding, config.embedding_dim)
                    self.groups[group.name] = group
            tables.append(physical)
        self.configs = [*tables, *pools.values()]
        self.pool_names = frozenset(pools)
        logical = [copy.deepcopy(config) for config in configs_of(module)]
        self.logical_configs = [*logical, *pools.values()]


class PhysicalCollection:
    """A collection of physical tables, on the meta device.

    Tables that are not compressed keep their own parameters.

    Attributes:
        physical: its tables.
    """

    physical: PhysicalTables

    def adopt(self, physical: PhysicalTables, module: Collection) -> None:
        """Keep uncompressed parameters, and every parameter's optimizer.

        Args:
            physical: the tables that the collection has been made of.
            module: the user's collection; not modified.
        """
        self.physical = physical
        groups = physical.groups
        own = modules_of(cast(Any, self))
        for name, table in modules_of(module).items():
            original: Any = table.weight
            if name not in groups or groups[name].looks_ahead:
                own[name].weight = original
                continue
            weight: Any = own[name].weight
            for attribute in ("_optimizer_classes", "_optimizer_kwargs"):
                if hasattr(original, attribute):
                    value = copy.deepcopy(getattr(original, attribute))
                    setattr(weight, attribute, value)
                    pool = groups[name].name
                    if pool in physical.pool_names:
                        setattr(own[pool].weight, attribute, copy.deepcopy(value))
        self.drop_pool_features()

    def drop_pool_features(self) -> None:
        """Take back the feature that TorchRec gives to a table without one."""
        for config in configs_of(cast(Any, self)):
            if config.name in self.physical.pool_names:
                config.feature_names = []


class PhysicalEmbeddingBagCollection(PhysicalCollection, EmbeddingBagCollection):
    """What TorchRec shards in place of pooled bags.

    Args:
        module: the user's collection; not modified.
        plan: the module's plan.
    """

    def __init__(self, module: EmbeddingBagCollection, plan: dict[str, ParameterSharding]) -> None:
        """Build the physical tables; see the class."""
        physical = PhysicalTables(module, plan)
        super().__init__(
            tables=cast(Any, physical.configs),
            is_weighted=module.is_weighted(),
            device=torch.device("meta"),
        )
        self.adopt(physical, module)


class PhysicalEmbeddingCollection(PhysicalCollection, EmbeddingCollection):
    """What TorchRec shards in place of sequences.

    Args:
        module: the user's collection; not modified.
        plan: the module's plan.
    """

    def __init__(self, module: EmbeddingCollection, plan: dict[str, ParameterSharding]) -> None:
        """Build the physical tables; see the class."""
        physical = PhysicalTables(module, plan)
        super().__init__(
            tables=cast(Any, physical.configs),
            device=torch.device("meta"),
            **sequence_options(module),
        )
        self.adopt(physical, module)
