"""The entries of a sharding plan for tables that have a kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)

from torchrec_cafe.distributed.grouping import Groups
from torchrec_cafe.distributed.table_collections import Collection
from torchrec_cafe.distributed.types import (
    CompressedGroup,
    CompressedParameterSharding,
    CompressedTable,
)


def compress_entries(
    collections: Sequence[tuple[str, Collection]], plan: ShardingPlan, groups: Groups
) -> None:
    """Turn a plan's entries of tables with a kind into theirs.

    Args:
        collections: of the model, by path.
        plan: mutated.
        groups: of the tables that have a kind.
    """
    for path, collection in collections:
        tables = cast(EmbeddingModuleShardingPlan, plan.plan.get(path, {}))
        for name, group in groups.get(id(collection), {}).items():
            # Where a pool stays together, its tables follow the first.
            first = tables[group.tables[0].name] if group.stays_together else tables[name]
            tables[name] = _compressed_sharding(name, group, tables[name], first)


def _compressed_sharding(
    name: str, group: CompressedGroup, planned: ParameterSharding, where: ParameterSharding
) -> CompressedParameterSharding:
    """The plan's entry on the ranks of another, with rows cut where the virtual shards are."""
    assert planned.sharding_type == group.sharding_type, (name, planned.sharding_type)
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
                # DCP saves one of the shards with the same offset, be it an empty one.
                shard_offsets=[begin if begin < end else rows[-1], 0],
                shard_sizes=[end - begin, dim],
                placement=shard.placement,
            )
            for begin, end, shard in zip(rows[:-1], rows[1:], old, strict=True)
        ]
    )
