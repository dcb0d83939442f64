"""What sharders and sharded collections with compressed tables have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torchrec.distributed.types import (
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingEnv2D,
)

from torchrec_cafe.distributed._torchrec import EmbeddingShardingInfo, kernels_of
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.lookahead import LookaheadEmbeddingBag
from torchrec_cafe.distributed.optimizers import check_one_optimizer
from torchrec_cafe.distributed.physical import PhysicalTables
from torchrec_cafe.distributed.sharded_state import add_state, take_state
from torchrec_cafe.distributed.types import (
    GROUP_PARAM,
    CompressedGroup,
    CompressedParameterSharding,
    sharding_types,
)

# Key under which the compressed tables of a sharding type are kept apart from TorchRec's own, so
# that those keep TorchRec's input dist, lookup and kernels.
_COMPRESSED = "compressed_"
_LOOKAHEAD = "lookahead_"


def group_of_infos(infos: Sequence[EmbeddingShardingInfo]) -> CompressedGroup | None:
    """A group of the tables of a sharding; ``None`` if they are TorchRec's own."""
    return (infos[0].fused_params or {}).get(GROUP_PARAM)


class ShardedCompressedCollection(nn.Module):
    """A sharded collection of TorchRec's, in which some tables are compressed.

    Attributes:
        tables_name: attribute that has the tables; keys of state dicts begin with it.
        groups: of the compressed and look-ahead tables, on whichever rank.
    """

    tables_name: ClassVar[str]
    groups: tuple[CompressedGroup, ...]

    def keep_groups(self, physical: PhysicalTables) -> None:
        """Have state dicts hold what TorchRec does not know of.

        Args:
            physical: the tables of the collection.
        """
        self.groups = tuple(dict.fromkeys(physical.groups.values()))
        self.register_state_dict_post_hook(add_state)
        self.register_load_state_dict_pre_hook(take_state)

    @classmethod
    def create_grouped_sharding_infos(
        cls, module: Any, *args: Any, **kwargs: Any
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """TorchRec's grouping, with compressed tables apart and marked with their group."""
        torchrec: Any = super()
        by_type = torchrec.create_grouped_sharding_infos(module, *args, **kwargs)
        module.drop_pool_features()
        physical: PhysicalTables = module.physical
        result: dict[str, list[EmbeddingShardingInfo]] = {}
        for sharding_type, infos in by_type.items():
            for info in infos:
                config = info.embedding_config
                group = physical.groups.get(config.name)
                if group is None:
                    result.setdefault(sharding_type, []).append(info)
                    continue
                if config.name in physical.pool_names:
                    config.feature_names, config.embedding_names = [], []
                assert info.fused_params is not None
                info.fused_params[GROUP_PARAM] = group
                prefix = _LOOKAHEAD if group.looks_ahead else _COMPRESSED
                result.setdefault(prefix + sharding_type, []).append(info)
        check_one_optimizer(result)
        return result

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Set the mode, also of the kernels: TorchRec keeps its lookups out of ``children()``."""
        super().train(mode)
        for kernel in (*self.compressed_kernels(), *self.lookahead_kernels()):
            kernel.train(mode)
        return self

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


class OwnSharder(ModuleSharder[Any]):
    """What the sharders of this package have in common: they shard tables with a kind.

    Every argument keeps TorchRec's meaning. A plan without compressed tables is sharded by
    TorchRec's own classes, unchanged.
    """

    def shard(
        self,
        module: Any,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
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
            torchrec: Any = super()
            return torchrec.shard(module, params, env, device, module_fqn)
        if isinstance(env, ShardingEnv2D):
            raise ValueError(
                f"tables {sorted(compressed)}: tables with `table=` cannot be replicated by "
                "DMPCollection, which averages rows without knowing what else they have; use "
                "DistributedModelParallel"
            )
        self.check_compressed(compressed)
        return self.shard_compressed(module, params, env, device=device, module_fqn=module_fqn)

    def check_compressed(self, tables: dict[str, CompressedParameterSharding]) -> None:
        """Refuse a sharding that a table cannot have.

        Args:
            tables: the plan of the tables with a kind.

        Raises:
            ValueError: naming the table and how it can be sharded.
        """
        for name, sharding in tables.items():
            possible = self.sharding_types_of(sharding)
            if sharding.sharding_type not in possible:
                raise ValueError(
                    f"table {name!r}: a {type(sharding.kind).__name__} table must be sharded "
                    f"{' or '.join(possible)}, got {sharding.sharding_type!r}"
                )

    def sharding_types_of(self, sharding: CompressedParameterSharding) -> tuple[str, ...]:
        """How a table can be sharded."""
        return sharding_types(sharding.kind)

    @abstractmethod
    def shard_compressed(
        self, module: Any, params: dict[str, ParameterSharding], env: ShardingEnv, **options: Any
    ) -> Any:
        """Shard a collection that has compressed tables.

        Args:
            module: the collection.
            params: its plan.
            env: process groups.
            options: further arguments of TorchRec's class.
        """
