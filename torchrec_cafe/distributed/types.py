"""What the sharding plan says about a compressed table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingType

from torchrec_cafe.config import Allocation, Lookahead, MemRec, QuotientRemainder, TableKind
from torchrec_cafe.config.memory import WEIGHTS_PER_LINE, WEIGHTS_PER_ROW
from torchrec_cafe.ops import first_mixed_id


def sharding_types(kind: TableKind) -> tuple[str, ...]:
    """How tables of a kind can be sharded; the first unless something else is asked for."""
    types = (
        ShardingType.ROW_WISE.value,
        ShardingType.TABLE_WISE.value,
        ShardingType.TABLE_ROW_WISE.value,
    )
    # Replicas of the others would each learn other hot ids, or are tables that plain ones replace.
    return (*types, ShardingType.DATA_PARALLEL.value) if isinstance(kind, MemRec) else types


def sequence_sharding_types(kind: TableKind) -> tuple[str, ...]:
    """How tables of a kind can be sharded in an ``EmbeddingCollection``.

    TorchRec has no more. All rows of an id then lie on one rank, whatever the kind.
    """
    both = (ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value)
    return tuple(sharding_type for sharding_type in sharding_types(kind) if sharding_type in both)


#: Key of ``fused_params`` under which a group travels through TorchRec to the kernel.
GROUP_PARAM = "torchrec_cafe_group"


def physical_kernel(sharding_type: str) -> str:
    """TorchRec's compute kernel of a compressed table, as TorchRec is told of it."""
    if sharding_type == ShardingType.DATA_PARALLEL.value:
        return EmbeddingComputeKernel.DENSE.value
    return EmbeddingComputeKernel.FUSED.value


@dataclass(frozen=True, kw_only=True)
class CompressedTable:
    """A table of a group.

    Attributes:
        name: name of the table.
        num_ids: rows of the uncompressed table.
        shared_rows: rows that its ids share, or look up by quotient and remainder; ``num_ids`` if
            it is kept whole; 0 if all its rows are in the pool.
        index: number in the pool, or -1: its ids have no rows in it.
    """

    name: str
    num_ids: int
    shared_rows: int
    index: int

    def check_hashing(self) -> None:
        """Check that what the rows of its ids are computed from fits 64 bits.

        Raises:
            ValueError: if it does not.
        """
        if self.num_ids * self.shared_rows >= 2**63:
            raise ValueError(
                f"table {self.name!r}: num_embeddings * shared rows must be below 2**63, got "
                f"{self.num_ids} * {self.shared_rows}; use a higher compression"
            )

    def __post_init__(self) -> None:
        """Check that keys of the pool fit 64 bits.

        Raises:
            ValueError: if they do not.
        """
        if self.index >= 2**15:
            raise ValueError(
                f"table {self.name!r}: a pool can track at most {2**15} tables; give some tables "
                "another kind"
            )


@dataclass(frozen=True, kw_only=True)
class CompressedGroup:
    """Tables that share a budget, a TBE and (some kinds) a pool of rows.

    Hashable, because TorchRec groups tables by their fused parameters.

    Attributes:
        name: unique in its module; names the pool in checkpoints.
        kind: how the tables are kept.
        sharding_type: of :func:`sharding_types`.
        tables: the tables.
        num_shards: virtual shards of the pool; 0 without a pool.
        hot_rows_per_shard: hot rows of a virtual shard.
        second_rows_per_shard: rows of a virtual shard that medium ids add to their shared row.
        buckets_per_shard: sketch buckets of a virtual shard.
        token_rows_per_shard: token rows of a virtual shard, of :class:`MemRec`.
        weights_per_shard: weights of a virtual shard.
        num_slots: slots of look-ahead tables, over all ranks.
        resident_bytes: everything that must be resident for lookups, over all ranks.
    """

    name: str
    kind: TableKind
    sharding_type: str
    tables: tuple[CompressedTable, ...]
    num_shards: int
    hot_rows_per_shard: int
    second_rows_per_shard: int
    buckets_per_shard: int
    token_rows_per_shard: int
    weights_per_shard: int
    num_slots: int
    resident_bytes: int

    @classmethod
    def from_allocation(
        cls,
        name: str,
        kind: TableKind,
        sharding_type: str,
        num_embeddings: dict[str, int],
        allocation: Allocation,
    ) -> CompressedGroup:
        """Name the parts of an allocation.

        Args:
            name: name of the group.
            kind: kind that made the allocation.
            sharding_type: of :func:`sharding_types`.
            num_embeddings: rows of each uncompressed table.
            allocation: what the kind gave them.
        """
        index = {table: i for i, table in enumerate(allocation.tracked)}
        tables = tuple(
            CompressedTable(
                name=table,
                num_ids=num_embeddings[table],
                shared_rows=rows,
                index=index.get(table, -1),
            )
            for table, rows in allocation.shared_rows.items()
        )
        if not isinstance(kind, Lookahead):
            for table in tables:
                table.check_hashing()
        return cls(
            name=name,
            kind=kind,
            sharding_type=sharding_type,
            tables=tables,
            num_shards=allocation.num_shards,
            hot_rows_per_shard=allocation.hot_rows_per_shard,
            second_rows_per_shard=allocation.second_rows_per_shard,
            buckets_per_shard=allocation.buckets_per_shard,
            token_rows_per_shard=allocation.token_rows_per_shard,
            weights_per_shard=allocation.weights_per_shard,
            num_slots=allocation.num_slots,
            resident_bytes=allocation.memory.total_bytes,
        )

    @property
    def weights_per_row(self) -> int:
        """Weights that share a row of FBGEMM, and that row's optimizer state."""
        return WEIGHTS_PER_ROW if isinstance(self.kind, MemRec) else WEIGHTS_PER_LINE

    @property
    def has_pool(self) -> bool:
        """Whether rows are shared by all tables of the group."""
        return self.num_shards > 0

    @property
    def stays_together(self) -> bool:
        """Whether all tables have to lie on the same rank or host: their pool does."""
        return self.has_pool and self.sharding_type in (
            ShardingType.TABLE_WISE.value,
            ShardingType.TABLE_ROW_WISE.value,
        )

    @property
    def gives_parts(self) -> bool:
        """Whether what a rank looks up is a part, which TorchRec adds to others' parts."""
        return self.sharding_type in (
            ShardingType.ROW_WISE.value,
            ShardingType.TABLE_ROW_WISE.value,
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether the tables are TorchRec's own, but for where their rows lie."""
        return isinstance(self.kind, Lookahead)

    @property
    def is_per_sample(self) -> bool:
        """Whether a sample has one vector, which all features give."""
        return isinstance(self.kind, MemRec) and self.kind.per == "sample"

    @property
    def pool_rows_per_shard(self) -> int:
        """Hot, second and token rows of a virtual shard."""
        return self.hot_rows_per_shard + self.second_rows_per_shard + self.token_rows_per_shard

    @property
    def pool_rows(self) -> int:
        """Rows of the pool over all ranks."""
        return self.num_shards * self.pool_rows_per_shard

    def table(self, name: str) -> CompressedTable:
        """The table of that name."""
        return next(table for table in self.tables if table.name == name)

    def shard_bounds(self, world_size: int) -> list[int]:
        """First virtual shard of each rank, and the number of shards: ``world_size + 1`` numbers.

        Args:
            world_size: ranks that a table is spread over: all, those of a host, or one.

        Raises:
            ValueError: if there are more ranks than virtual shards.
        """
        if world_size > self.num_shards:
            raise ValueError(
                f"group {self.name!r}: num_shards must be at least the number of ranks, got "
                f"num_shards={self.num_shards} for {world_size} ranks; "
                f"set {type(self.kind).__name__}(num_shards={world_size}) or more"
            )
        return even_bounds(self.num_shards, world_size)

    def row_bounds(self, table: CompressedTable, world_size: int) -> list[int]:
        """First shared row of each rank, and the number of rows: ``world_size + 1`` numbers.

        A rank owns the rows of its virtual shards, so that an id's shared row, its place in the
        sketch and its hot row are always on one rank.
        """
        if isinstance(self.kind, QuotientRemainder):
            # Ids that share a remainder row have all kinds of quotients: a table stays together.
            owner = self._owner(table, world_size)
            return [table.shared_rows if rank > owner else 0 for rank in range(world_size + 1)]
        if not self.has_pool:
            return even_bounds(table.shared_rows, world_size)
        shards = self.shard_bounds(world_size)
        return [-(-shard * table.shared_rows // self.num_shards) for shard in shards]

    def _owner(self, table: CompressedTable, world_size: int) -> int:
        """The rank of a table that stays together: large ones first, to the least loaded."""
        load = [0] * world_size
        for other in sorted(self.tables, key=lambda t: (-t.shared_rows, t.name)):
            owner = load.index(min(load))
            if other == table:
                return owner
            load[owner] += other.shared_rows
        raise ValueError(f"group {self.name!r} has no table {table.name!r}")

    def id_bounds(self, table: CompressedTable, world_size: int) -> list[int]:
        """First mixed id of each rank, and the number of ids: ``world_size + 1`` numbers."""
        if table.shared_rows == 0:
            shards = self.shard_bounds(world_size)
            return [first_mixed_id(shard, table.num_ids, self.num_shards) for shard in shards]
        rows = self.row_bounds(table, world_size)
        return [first_mixed_id(row, table.num_ids, table.shared_rows) for row in rows]


def even_bounds(size: int, parts: int) -> list[int]:
    """Cut ``[0, size)`` as TorchRec does: blocks of ``ceil(size / parts)``, the last shorter."""
    block = -(-size // parts)
    return [min(size, block * part) for part in range(parts + 1)]


@dataclass
class CompressedParameterSharding(ParameterSharding):
    """The sharding of a compressed table.

    ``sharding_spec`` describes the shared rows. The compute kernel is ``customized_kernel``, so
    that a sharder that does not know compressed tables refuses the plan instead of building the
    table in full.

    Attributes:
        group: the table's group; the same object for all its tables.
    """

    group: CompressedGroup | None = None

    def __post_init__(self) -> None:
        """Check that the plan can only be understood as a compressed table's.

        Raises:
            ValueError: if the group is missing or the compute kernel is another.
        """
        if self.group is None:
            raise ValueError("CompressedParameterSharding: `group` must be given")
        if self.compute_kernel != EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value:
            raise ValueError(
                "CompressedParameterSharding: `compute_kernel` must be 'customized_kernel', got "
                f"{self.compute_kernel!r}"
            )

    @property
    def kind(self) -> TableKind:
        """How the table is kept."""
        assert self.group is not None
        return self.group.kind

    def get_additional_fused_params(self) -> dict[str, Any]:
        """What TorchRec hands to the kernel of a customized table."""
        return {GROUP_PARAM: self.group}
