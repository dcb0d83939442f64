"""How a table is kept. Standard library only.

A *kind* (:class:`Hash`, :class:`Cafe`) says how the rows of an embedding table are kept. Kinds are
frozen, keyword-only dataclasses: hashable, comparable, and safe to share between tables.

Bytes are counted in full. ``compression`` promises that everything that must be resident for
lookups (shared rows, hot rows, sketch, maps) takes at most ``dense weight bytes / compression``.
Optimizer state follows the rows and is not part of the promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torchrec_cafe.config.memory import (
    BUCKET_SLOTS,
    OWNER_BYTES,
    SHARD_BYTES,
    SLOT_BYTES,
    TABLE_STATISTICS_BYTES,
    Allocation,
    MemoryBreakdown,
    TableShape,
    item_bytes,
)

# Cafe divides its shared rows in proportion to 1 / sqrt(ids of the table). Every table has a lookup
# in every sample, so a row of a small table tells more lookups apart than one of a large table. In
# proportion to the tables' sizes, as hashing does it, nearly all rows would go to huge tables,
# whose ids are too many to be told apart by shared rows anyway.
SHARED_ROWS_EXPONENT = -0.5

# Tables of at most this many ids, divided by the compression, stay whole under Hash: the rule of
# the CAFE paper's own experiments, for all of its methods.
HASH_WHOLE_IDS = 2000


def _check_compression(compression: float) -> None:
    if not (math.isfinite(compression) and compression >= 1):
        raise ValueError(f"compression must be a finite number >= 1, got {compression}")


def _check_whole_fraction(whole_fraction: float) -> None:
    if not 0 <= whole_fraction < 1:
        raise ValueError(f"whole_fraction must be in [0, 1), got {whole_fraction}")


def _smallest(tables: Sequence[TableShape], available: int) -> set[str]:
    """The smallest tables whose rows fit ``available`` bytes, largest such set."""
    chosen: set[str] = set()
    for table in sorted(tables, key=lambda t: (t.num_embeddings, t.name)):
        available -= table.dense_bytes
        if available < 0:
            break
        chosen.add(table.name)
    return chosen


def _budget(tables: Sequence[TableShape], compression: float) -> int:
    if not tables:
        raise ValueError("tables must not be empty")
    if len({table.row_bytes for table in tables}) > 1:
        raise ValueError(
            "the tables of a group must have the same embedding_dim and dtype, got "
            + ", ".join(f"{t.name!r}: {t.embedding_dim} x {t.item_bytes} bytes" for t in tables)
        )
    return math.floor(sum(table.dense_bytes for table in tables) / compression)


def _too_small(
    tables: Sequence[TableShape], compression: float, fits: Callable[[float], bool]
) -> ValueError:
    """The refusal of a compression, with the largest that works, found by bisection."""
    works, fails = 1.0, compression
    while fails > 1.0001 * works:
        middle = math.sqrt(works * fails)
        works, fails = (middle, fails) if fits(middle) else (works, middle)
    works = math.floor(100 * works) / 100
    # Keeping one table more whole can make a lower compression the one that fails.
    while works > 1 and not fits(works):
        works = math.floor(99 * works) / 100
    advice = (
        f"the largest compression that works is {works:.15g}"
        if works >= 1 and fits(works)
        else "leave the table uncompressed"
    )
    names = ", ".join(repr(table.name) for table in tables)
    dense = sum(table.dense_bytes for table in tables)
    return ValueError(
        f"compression={compression:g} leaves no row for table {names}: {dense} bytes / "
        f"{compression:g} is too little; {advice}"
    )


def _split_rows(tables: Sequence[TableShape], rows: int, *, exponent: float) -> dict[str, int]:
    """Divide ``rows`` in proportion to ``num_embeddings ** exponent``.

    Every table gets at least one row and at most one per id; what a table cannot use goes to the
    others.
    """
    shared: dict[str, int] = {}
    weights = {t.name: float(t.num_embeddings) ** exponent for t in tables}
    left, total = rows, sum(weights.values())
    # Tables that reach a limit come first, so that the rest can share what remains.
    for table in sorted(tables, key=lambda t: (t.num_embeddings / weights[t.name], t.name)):
        weight = weights[table.name]
        others = len(tables) - len(shared) - 1
        part = min(math.floor(left * weight / total), left - others)
        shared[table.name] = min(table.num_embeddings, max(1, part))
        left -= shared[table.name]
        total -= weight
    return {table.name: shared[table.name] for table in tables}


@dataclass(frozen=True, kw_only=True)
class Hash:
    """The hashing trick: the ids of a table share ``num_embeddings / compression`` rows.

    The baseline that every compressed embedding is compared with. As in the CAFE paper's
    experiments, tables of at most ``2000 / compression`` ids stay whole; here that is charged to
    the budget.

    Attributes:
        compression: dense weight bytes divided by resident bytes, >= 1. Tables of an
            ``EmbeddingBagCollection`` with equal kinds share one budget.
        whole_fraction: share of the budget that may go to keeping the smallest tables whole, in
            [0, 1); a stronger baseline than the usual one.
    """

    compression: float
    whole_fraction: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if an argument is out of range.
        """
        _check_compression(self.compression)
        _check_whole_fraction(self.whole_fraction)

    def allocate(self, tables: Sequence[TableShape]) -> Allocation:
        """Rows of each table: its share of the budget, at least one.

        Args:
            tables: tables of equal dim and dtype that share the budget.

        Raises:
            ValueError: if the budget leaves a table without a row.
        """
        row_bytes = tables[0].row_bytes if tables else 0
        budget = _budget(tables, self.compression)
        rows = budget // row_bytes
        if rows < len(tables):
            raise _too_small(
                tables, self.compression, lambda c: _budget(tables, c) >= len(tables) * row_bytes
            )
        whole = _smallest(tables, math.floor(self.whole_fraction * budget))
        few = HASH_WHOLE_IDS / self.compression
        tiny = [table for table in tables if table.num_embeddings <= few]
        if sum(table.num_embeddings for table in tiny) + len(tables) <= rows:
            whole |= {table.name for table in tiny}
        shared = {table.name: table.num_embeddings for table in tables if table.name in whole}
        rest = [table for table in tables if table.name not in whole]
        shared |= _split_rows(rest, rows - sum(shared.values()), exponent=1.0)
        memory = MemoryBreakdown(
            shared_bytes=sum(shared.values()) * row_bytes,
            hot_bytes=0,
            sketch_bytes=0,
            map_bytes=0,
            dense_bytes=sum(table.dense_bytes for table in tables),
        )
        return Allocation(
            shared_rows=MappingProxyType({table.name: shared[table.name] for table in tables}),
            num_shards=0,
            hot_rows_per_shard=0,
            buckets_per_shard=0,
            tracked=(),
            memory=memory,
        )

    def memory(self, num_embeddings: int, embedding_dim: int, dtype: object) -> MemoryBreakdown:
        """What one table costs on its own; see :meth:`Cafe.memory`."""
        return _memory(self, num_embeddings, embedding_dim, dtype)


@dataclass(frozen=True, kw_only=True)
class Cafe:
    """Hot ids own a row, the others share hashed rows (CAFE, SIGMOD 2024).

    A sketch of gradient importance (HotSketch) decides which ids are hot, and keeps deciding as
    the data drifts. All CAFE tables of a group (same dim, dtype, pooling) share one pool of hot
    rows and one sketch. Tables with equal kinds share one budget: small ones are kept whole
    within it, the rest goes to hot rows and shared rows.

    Attributes:
        compression: dense weight bytes divided by resident bytes (shared rows, hot rows, sketch,
            maps), >= 1.
        hot_fraction: share of the budget, after whole tables, that goes to hot rows and their
            sketch, in (0, 1).
        whole_fraction: share of the budget that may go to keeping the smallest tables whole, in
            [0, 1).
        slots_per_hot_row: slots of the sketch per hot row, >= 1; more remember more candidates.
        threshold: smallest importance, in average occurrences, that earns a row; ``None`` gives
            the rows to the highest scores.
        hysteresis: a hot id keeps its row until its score is this far below the threshold,
            relative, in [0, 1).
        half_life: steps after which an occurrence counts half, > 0; ``inf`` never forgets.
        rebalance_interval: steps between two decisions on the same virtual shard, >= 1.
        num_shards: virtual shards of the pool, fixed for the life of a checkpoint; at least the
            number of ranks that the table is ever spread over.
    """

    compression: float
    hot_fraction: float = 0.4
    whole_fraction: float = 0.25
    slots_per_hot_row: float = 3.0
    threshold: float | None = None
    hysteresis: float = 0.1
    half_life: float = math.inf
    rebalance_interval: int = 16
    num_shards: int = 64

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if an argument is out of range.
        """
        _check_compression(self.compression)
        _check_whole_fraction(self.whole_fraction)
        checks = {
            "hot_fraction": ("in (0, 1)", 0 < self.hot_fraction < 1),
            "slots_per_hot_row": (">= 1", self.slots_per_hot_row >= 1),
            "threshold": (">= 0", self.threshold is None or self.threshold >= 0),
            "hysteresis": ("in [0, 1)", 0 <= self.hysteresis < 1),
            "half_life": ("> 0", self.half_life > 0),
            "rebalance_interval": (">= 1", self.rebalance_interval >= 1),
            "num_shards": ("in [1, 2**20]", 1 <= self.num_shards <= 2**20),
        }
        for name, (wanted, holds) in checks.items():
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")

    @property
    def growth(self) -> float:
        """Factor by which the score of an occurrence exceeds that of one a step before."""
        return 2.0 ** (1.0 / self.half_life)

    def allocate(self, tables: Sequence[TableShape]) -> Allocation:
        """Divide the budget of a group between whole tables, hot rows, sketch and shared rows.

        Args:
            tables: tables of equal dim and dtype that share the budget.

        Raises:
            ValueError: if the budget leaves a table without a row or the pool without a hot row
                in each virtual shard.
        """
        allocation = self._divide(tables)
        if allocation is None:
            raise _too_small(tables, self.compression, lambda c: self._fits(tables, c))
        return allocation

    def _fits(self, tables: Sequence[TableShape], compression: float) -> bool:
        other = replace(self, compression=compression)
        return other._divide(tables) is not None  # noqa: SLF001  of this very class

    def _divide(self, tables: Sequence[TableShape]) -> Allocation | None:
        """What :meth:`allocate` returns, or ``None`` if the budget is too small."""
        row_bytes = tables[0].row_bytes if tables else 0
        budget = _budget(tables, self.compression)
        whole = _smallest(tables, math.floor(self.whole_fraction * budget))
        rest = [table for table in tables if table.name not in whole]
        shared = {table.name: table.num_embeddings for table in tables if table.name in whole}
        left = budget - sum(shared.values()) * row_bytes
        fixed = self.num_shards * (SHARD_BYTES + TABLE_STATISTICS_BYTES * len(rest))
        hot_rows = buckets = 0
        if rest:
            hot_rows = self._hot_rows(self.hot_fraction * left - fixed, row_bytes)
            buckets = math.ceil(hot_rows * self.slots_per_hot_row / BUCKET_SLOTS)
            left -= fixed + self.num_shards * self._pool_bytes(hot_rows, buckets, row_bytes)
            if hot_rows < 1 or left < len(rest) * row_bytes:
                return None
            shared |= _split_rows(rest, left // row_bytes, exponent=SHARED_ROWS_EXPONENT)
        pool = self.num_shards if rest else 0
        memory = MemoryBreakdown(
            shared_bytes=sum(shared.values()) * row_bytes,
            hot_bytes=pool * hot_rows * row_bytes,
            sketch_bytes=pool * buckets * BUCKET_SLOTS * SLOT_BYTES + (fixed if rest else 0),
            map_bytes=pool * hot_rows * OWNER_BYTES,
            dense_bytes=sum(table.dense_bytes for table in tables),
        )
        return Allocation(
            shared_rows=MappingProxyType({table.name: shared[table.name] for table in tables}),
            num_shards=pool,
            hot_rows_per_shard=hot_rows,
            buckets_per_shard=buckets,
            tracked=tuple(table.name for table in rest),
            memory=memory,
        )

    @staticmethod
    def _pool_bytes(hot_rows: int, buckets: int, row_bytes: int) -> int:
        """Bytes of a virtual shard that grow with its hot rows."""
        return hot_rows * (row_bytes + OWNER_BYTES) + buckets * BUCKET_SLOTS * SLOT_BYTES

    def _hot_rows(self, available: float, row_bytes: int) -> int:
        """Most hot rows per virtual shard whose rows, owners and sketch fit ``available``."""
        per_row = row_bytes + OWNER_BYTES + self.slots_per_hot_row * SLOT_BYTES
        hot_rows = max(0, math.floor(available / self.num_shards / per_row))
        while hot_rows > 0:
            buckets = math.ceil(hot_rows * self.slots_per_hot_row / BUCKET_SLOTS)
            if self.num_shards * self._pool_bytes(hot_rows, buckets, row_bytes) <= available:
                break
            hot_rows -= 1
        return hot_rows

    def memory(self, num_embeddings: int, embedding_dim: int, dtype: object) -> MemoryBreakdown:
        """What one table costs on its own, before anything is run.

        Args:
            num_embeddings: rows of the uncompressed table.
            embedding_dim: its columns, a multiple of 4.
            dtype: float32 or float16, as a string, a ``torch.dtype`` or TorchRec's ``DataType``.

        Returns:
            Bytes of shared rows, hot rows, sketch and maps; their sum is at most the dense bytes
            divided by ``compression``.

        Raises:
            ValueError: if the compression leaves no row, naming the largest that works.
        """
        return _memory(self, num_embeddings, embedding_dim, dtype)


def _memory(
    kind: TableKind, num_embeddings: int, embedding_dim: int, dtype: object
) -> MemoryBreakdown:
    shape = TableShape(
        name="table",
        num_embeddings=num_embeddings,
        embedding_dim=embedding_dim,
        item_bytes=item_bytes(dtype),
    )
    return kind.allocate([shape]).memory


#: Every kind of table.
TableKind = Hash | Cafe
