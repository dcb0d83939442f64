"""``EmbeddingBagCollection`` with compressed tables: sharder and sharded module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TorchRecSharder
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import (
    ParameterSharding,
    ShardingEnv,
    ShardingEnv2D,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_cafe.distributed._torchrec import (
    EmbeddingShardingInfo,
    ShardedEmbeddingBagCollection,
    kernels_of,
    lookups_of,
    pool_means_once,
    present_tables,
)
from torchrec_cafe.distributed.data_parallel import (
    CompressedDpPooledEmbeddingSharding,
    DenseMemRecEmbeddingBag,
)
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.lookahead import (
    LOOKAHEAD_SHARDINGS,
    LookaheadEmbeddingBag,
    LookaheadGroupedPooledEmbeddingsLookup,
)
from torchrec_cafe.distributed.row_wise import CompressedRwPooledEmbeddingSharding
from torchrec_cafe.distributed.sharded_state import add_state, take_state
from torchrec_cafe.distributed.table_row_wise import CompressedTwRwPooledEmbeddingSharding
from torchrec_cafe.distributed.table_wise import CompressedTwPooledEmbeddingSharding
from torchrec_cafe.distributed.types import (
    GROUP_PARAM,
    CompressedGroup,
    CompressedParameterSharding,
    physical_kernel,
    sharding_types,
)

# Key under which the compressed tables of a sharding type are kept apart from TorchRec's own, so
# that those keep TorchRec's input dist, lookup and kernels.
_COMPRESSED = "compressed_"
_LOOKAHEAD = "lookahead_"

_SHARDINGS: dict[str, Any] = {
    ShardingType.ROW_WISE.value: CompressedRwPooledEmbeddingSharding,
    ShardingType.TABLE_WISE.value: CompressedTwPooledEmbeddingSharding,
    ShardingType.TABLE_ROW_WISE.value: CompressedTwRwPooledEmbeddingSharding,
}


def _pool_config(group: CompressedGroup, like: EmbeddingBagConfig) -> EmbeddingBagConfig:
    """The rows of a pool as a table without features."""
    return EmbeddingBagConfig(
        name=group.name,
        num_embeddings=group.pool_rows,
        embedding_dim=like.embedding_dim,
        data_type=like.data_type,
        pooling=like.pooling,
        feature_names=[],
        weight_init_min=0.0,
        weight_init_max=0.0,
        init_fn=_init_of_pool(group),
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


class PhysicalEmbeddingBagCollection(EmbeddingBagCollection):
    """What TorchRec shards: every compressed table at its physical size, and the pools.

    Lives on the meta device; tables that are not compressed keep their own parameters.

    Args:
        module: the user's collection; not modified.
        plan: the module's plan.
    """

    def __init__(self, module: EmbeddingBagCollection, plan: dict[str, ParameterSharding]) -> None:
        """Build the physical configurations; see the class."""
        configs: list[EmbeddingBagConfig] = []
        groups: dict[str, CompressedGroup] = {}
        pools: dict[str, EmbeddingBagConfig] = {}
        self_plan: dict[str, ParameterSharding] = {}
        for config in module.embedding_bag_configs():
            sharding = plan[config.name]
            physical = copy.deepcopy(config)
            self_plan[config.name] = sharding
            if isinstance(sharding, CompressedParameterSharding):
                assert sharding.group is not None
                group = sharding.group
                groups[config.name] = group
                # The weights keep the spread of the uncompressed table's (init_fn is set already).
                physical.weight_init_min = config.get_weight_init_min()
                physical.weight_init_max = config.get_weight_init_max()
                physical.num_embeddings = group.table(config.name).shared_rows
                self_plan[config.name] = _as_physical(sharding, sharding.sharding_spec)
                if group.has_pool and group.name not in pools:
                    pools[group.name] = _pool_config(group, config)
                    self_plan[group.name] = _pool_sharding(group, sharding, config.embedding_dim)
                    groups[group.name] = group
            configs.append(physical)
        super().__init__(
            tables=[*configs, *pools.values()],
            is_weighted=module.is_weighted(),
            device=torch.device("meta"),
        )
        self.groups = groups
        self.pool_names = frozenset(pools)
        self.plan = self_plan
        logical = [copy.deepcopy(config) for config in module.embedding_bag_configs()]
        self.logical_configs = [*logical, *pools.values()]
        self._adopt_parameters(module)
        self.drop_pool_features()

    def _adopt_parameters(self, module: EmbeddingBagCollection) -> None:
        """Keep uncompressed parameters, and every parameter's optimizer."""
        for name, bag in module.embedding_bags.items():
            original: Any = bag.weight
            if name not in self.groups or self.groups[name].looks_ahead:
                self.embedding_bags[name].weight = original
                continue
            weight: Any = self.embedding_bags[name].weight
            for attribute in ("_optimizer_classes", "_optimizer_kwargs"):
                if hasattr(original, attribute):
                    value = copy.deepcopy(getattr(original, attribute))
                    setattr(weight, attribute, value)
                    pool = self.groups[name].name
                    if pool in self.pool_names:
                        setattr(self.embedding_bags[pool].weight, attribute, copy.deepcopy(value))

    def drop_pool_features(self) -> None:
        """Take back the feature that TorchRec gives to a table without one."""
        for config in self.embedding_bag_configs():
            if config.name in self.pool_names:
                config.feature_names = []


class ShardedCompressedEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection, in which some tables are compressed.

    Args:
        module: the physical collection.
        env: process groups.
        options: further arguments of TorchRec's class.

    Attributes:
        groups: of the compressed and look-ahead tables, on whichever rank.
    """

    def __init__(
        self, module: PhysicalEmbeddingBagCollection, env: ShardingEnv, **options: Any
    ) -> None:
        """Shard; see the class."""
        super().__init__(module, module.plan, env, **options)
        # Ids are those of the uncompressed tables.
        present_tables(self, module.logical_configs)
        pool_means_once(self)
        for kernel in kernels_of(self):
            if isinstance(kernel, DenseMemRecEmbeddingBag):
                pool = self.embedding_bags[kernel.group.name]
                pool.register_parameter("weight_table", kernel.bags.weights)
        self.groups = tuple(dict.fromkeys(module.groups.values()))
        self._register_state_dict_hook(add_state)
        self._register_load_state_dict_pre_hook(take_state, with_module=True)

    @classmethod
    def create_grouped_sharding_infos(
        cls, module: Any, *args: Any, **kwargs: Any
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """TorchRec's grouping, with compressed tables apart and marked with their group."""
        by_type = super().create_grouped_sharding_infos(module, *args, **kwargs)
        module.drop_pool_features()
        result: dict[str, list[EmbeddingShardingInfo]] = {}
        for sharding_type, infos in by_type.items():
            for info in infos:
                config = info.embedding_config
                if config.name not in module.groups:
                    result.setdefault(sharding_type, []).append(info)
                    continue
                if config.name in module.pool_names:
                    config.feature_names, config.embedding_names = [], []
                assert info.fused_params is not None
                info.fused_params[GROUP_PARAM] = module.groups[config.name]
                prefix = _LOOKAHEAD if module.groups[config.name].looks_ahead else _COMPRESSED
                result.setdefault(prefix + sharding_type, []).append(info)
        _check_optimizers(result)
        return result

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Our sharding for compressed tables, TorchRec's for the others."""
        if GROUP_PARAM not in (sharding_infos[0].fused_params or {}):
            return super().create_embedding_bag_sharding(sharding_infos, env, *args, **kwargs)
        device = args[0] if args else kwargs.get("device")
        sharding_type = sharding_infos[0].param_sharding.sharding_type
        if sharding_type == ShardingType.DATA_PARALLEL.value:  # no communication to encode
            return CompressedDpPooledEmbeddingSharding(sharding_infos, env, device)
        group = (sharding_infos[0].fused_params or {})[GROUP_PARAM]
        shardings = LOOKAHEAD_SHARDINGS if group.looks_ahead else _SHARDINGS
        return shardings[sharding_type](
            sharding_infos,
            env,
            device,
            qcomm_codecs_registry=kwargs.get("qcomm_codecs_registry"),
        )

    def train(self, mode: bool = True) -> ShardedCompressedEmbeddingBagCollection:  # noqa: FBT001, FBT002
        """Set the mode, also of the kernels: TorchRec keeps its lookups out of ``children()``."""
        super().train(mode)
        for kernel in (*self.compressed_kernels(), *self.lookahead_kernels()):
            kernel.train(mode)
        return self

    def look_ahead(self, features: Any) -> None:
        """Begin to bring in the rows of look-ahead tables that a coming batch needs.

        Args:
            features: what the input dist has given for it; :meth:`compute_and_output_dist` will be
                given the same.
        """
        for lookup, part in zip(lookups_of(self), features, strict=True):
            if isinstance(lookup, LookaheadGroupedPooledEmbeddingsLookup):
                lookup.prefetch(part)

    def lookahead_kernels(self) -> Iterator[LookaheadEmbeddingBag]:
        """The kernels of the look-ahead groups, on this rank."""
        for kernel in kernels_of(self):
            if isinstance(kernel, LookaheadEmbeddingBag):
                yield kernel

    def compressed_kernels(self) -> Iterator[CompressedEmbeddingBag]:
        """The kernels of the compressed groups, on this rank."""
        for kernel in kernels_of(self):
            if isinstance(kernel, CompressedEmbeddingBag):
                yield kernel


def _check_optimizers(infos: dict[str, list[EmbeddingShardingInfo]]) -> None:
    """All tables of a group live in one TBE, which has one optimizer."""
    params: dict[CompressedGroup, tuple[str, dict[str, Any]]] = {}
    for info in (info for group in infos.values() for info in group):
        group = (info.fused_params or {}).get(GROUP_PARAM)
        if group is None:
            continue
        name = info.embedding_config.name
        first, expected = params.setdefault(group, (name, info.fused_params or {}))
        if info.fused_params != expected:
            raise ValueError(
                f"tables {first!r} and {name!r} share the group {group.name!r}, so they must have "
                f"the same optimizer and fused parameters, got {expected} and {info.fused_params}; "
                "give them kinds that differ (say, in compression) to keep them apart"
            )


class EmbeddingBagCollectionSharder(TorchRecSharder):
    """Drop-in for TorchRec's sharder that understands compressed tables.

    Every argument keeps TorchRec's meaning. A plan without compressed tables is sharded by
    TorchRec's own classes, unchanged.
    """

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Shard a collection according to its plan.

        Args:
            module: the collection.
            params: its plan; compressed tables have a :class:`CompressedParameterSharding`.
            env: process groups.
            device: where the rows live.
            module_fqn: name of the module in the model.

        Raises:
            ValueError: if a compressed table is sharded in a way that it cannot be.
        """
        compressed = {
            name: sharding
            for name, sharding in params.items()
            if isinstance(sharding, CompressedParameterSharding)
        }
        if not compressed:
            return super().shard(module, params, env, device, module_fqn)
        if isinstance(env, ShardingEnv2D):
            raise ValueError(
                f"tables {sorted(compressed)}: tables with `table=` cannot be replicated by "
                "DMPCollection, which averages rows without knowing what else they have; use "
                "DistributedModelParallel"
            )
        for name, sharding in compressed.items():
            possible = sharding_types(sharding.kind)
            if sharding.sharding_type not in possible:
                raise ValueError(
                    f"table {name!r}: a {type(sharding.kind).__name__} table must be sharded "
                    f"{' or '.join(possible)}, got {sharding.sharding_type!r}"
                )
        return ShardedCompressedEmbeddingBagCollection(
            PhysicalEmbeddingBagCollection(module, params),
            env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
        )


def default_sharders() -> list[Any]:
    """TorchRec's default sharders, with ours for ``EmbeddingBagCollection``."""
    others = [s for s in get_default_sharders() if s.module_type is not EmbeddingBagCollection]
    return [EmbeddingBagCollectionSharder(), *others]
