"""CAFE tables: what they are, and how they divide a budget. Standard library only.

Bytes are counted in full. ``compression`` promises that everything that must be resident for
lookups (shared rows, hot rows, sketch, maps) takes at most ``dense weight bytes / compression``.
Optimizer state follows the rows and is not part of the promise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType

from torchrec_cafe.config.budget import (
    TableKind,
    budget_of,
    check_arguments,
    check_compression,
    check_whole_fraction,
    rows_alone,
    smallest,
    split_rows,
    too_small,
)
from torchrec_cafe.config.memory import (
    BUCKET_SLOTS,
    MAX_HASHES,
    OWNER_BYTES,
    SHARD_BYTES,
    SLOT_BYTES,
    TABLE_STATISTICS_BYTES,
    WEIGHT_BYTES,
    WEIGHTS_PER_LINE,
    Allocation,
    MemoryBreakdown,
    TableShape,
    whole_weights,
)

# Cafe divides its shared rows in proportion to 1 / sqrt(ids of the table). Every table has a lookup
# in every sample, so a row of a small table tells more lookups apart than one of a large table. In
# proportion to the tables' sizes, as hashing does it, nearly all rows would go to huge tables,
# whose ids are too many to be told apart by shared rows anyway.
SHARED_ROWS_EXPONENT = -0.5

# Virtual shards of a pool, unless a number is asked for: the first of these that leaves every shard
# a fair number of hot rows. Each shard picks its own hottest ids, so that with few rows each, a
# shard that happens to hold many hot ids leaves some out; and shards have fixed costs.
_NUM_SHARDS = (64, 32, 16)
_FAIR_HOT_ROWS = 64
_FEW_SHARDS = (8, 4, 2, 1)

# Learned factors pay where many ids share a row. Where few do they win nothing: on the accuracy
# study's data sets, between 10x and 100x.
_FACTORS_FROM = 50.0
_FACTORS_HASHES = 2

# Without factors, second rows pay where next to nothing is left for rows of one's own. At milder
# compressions their bytes do more as shared rows: on the accuracy study's data sets, up to 100x; at
# 1000x it is even, but with drift second rows win, and at 10000x everywhere. Beside factors they
# win nothing there, as far as one seed without drift says.
_SECOND_ROWS_FROM = 300.0
_SECOND_ROWS = 0.3

#: What the importance of an occurrence may be.
IMPORTANCE = ("gradient_norm", "frequency")


@dataclass(frozen=True, kw_only=True)
class Cafe(TableKind):
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
        medium_fraction: share of the shared rows' bytes that goes to second rows, in [0, 1): ids
            that are important, but not enough for a row of their own, look up the sum of two
            shared rows. 0: none. ``None``: 0.3 from a compression of 300 on if ids have no factors
            (``num_weight_hashes=0``), else 0.
        num_weight_hashes: weights whose sum scales the rows of an id, learned as MEM-REC's are, in
            [0, 16]: ids that share a row differ in it. 0: rows are not scaled. ``None``: 2 from a
            compression of 50 on, which is where they pay in accuracy for the time that they cost,
            else 0.
        weight_fraction: share of the budget, after whole tables, that goes to these weights, if
            there are any, in (0, 1); less where too little would be left for rows.
        slots_per_hot_row: slots of the sketch per hot row, >= 1; more remember more candidates.
        importance: ``"gradient_norm"`` (of the bag's gradient) or ``"frequency"``.
        threshold: smallest importance, in average occurrences, that earns a row; ``None`` gives
            the rows to the highest scores.
        hysteresis: a hot id keeps its row until its score is this far below the threshold,
            relative, in [0, 1).
        half_life: after how many bags per hot row an occurrence counts half, > 0; ``inf`` never
            forgets. In these units it needs no tuning to a batch size or a compression: it is how
            many bags the sketch judges by.
        rebalance_interval: steps between two decisions on the same virtual shard, >= 1.
        num_shards: virtual shards of the pool, fixed for the life of a checkpoint; at least the
            number of ranks that the table is ever spread over. ``None``: 64, fewer for small pools.
        pool: name of the pool: tables whose kinds differ in nothing else share nothing either.
    """

    compression: float
    hot_fraction: float = 0.4
    whole_fraction: float = 0.25
    medium_fraction: float | None = None
    num_weight_hashes: int | None = None
    weight_fraction: float = 0.6
    slots_per_hot_row: float = 3.0
    importance: str = "gradient_norm"
    threshold: float | None = None
    hysteresis: float = 0.1
    half_life: float = 16000.0
    rebalance_interval: int = 16
    num_shards: int | None = None
    pool: str = ""

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if an argument is out of range.
        """
        check_compression(self.compression)
        check_whole_fraction(self.whole_fraction)
        checks = {
            "hot_fraction": ("in (0, 1)", 0 < self.hot_fraction < 1),
            "weight_fraction": ("in (0, 1)", 0 < self.weight_fraction < 1),
            "slots_per_hot_row": (">= 1", self.slots_per_hot_row >= 1),
            "threshold": (">= 0", self.threshold is None or self.threshold >= 0),
            "hysteresis": ("in [0, 1)", 0 <= self.hysteresis < 1),
            "half_life": ("> 0", self.half_life > 0),
            "rebalance_interval": (">= 1", self.rebalance_interval >= 1),
            "medium_fraction": (
                "in [0, 1) or None",
                self.medium_fraction is None or 0 <= self.medium_fraction < 1,
            ),
            "num_weight_hashes": (
                f"in [0, {MAX_HASHES}] or None",
                self.num_weight_hashes is None or 0 <= self.num_weight_hashes <= MAX_HASHES,
            ),
            "importance": (f"one of {IMPORTANCE}", self.importance in IMPORTANCE),
            "num_shards": (
                "in [1, 65536] or None",
                self.num_shards is None or 1 <= self.num_shards <= 65536,
            ),
        }
        check_arguments(self, checks)

    @property
    def weight_hashes(self) -> int:
        """Weights of an id's factor: :attr:`num_weight_hashes`, or what ``None`` stands for."""
        if self.num_weight_hashes is not None:
            return self.num_weight_hashes
        return _FACTORS_HASHES if self.compression >= _FACTORS_FROM else 0

    @property
    def second_rows(self) -> float:
        """Share of second rows: :attr:`medium_fraction`, or what ``None`` stands for."""
        if self.medium_fraction is not None:
            return self.medium_fraction
        pays = self.weight_hashes == 0 and self.compression >= _SECOND_ROWS_FROM
        return _SECOND_ROWS if pays else 0.0

    def growth(self, bags_per_hot_row: float) -> float:
        """Factor by which an occurrence counts more than one so many bags per hot row before.

        Args:
            bags_per_hot_row: >= 0.
        """
        return 2.0 ** min(60.0, bags_per_hot_row / self.half_life)

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
            raise too_small(tables, self.compression, lambda c: self._fits(tables, c))
        return allocation

    def _fits(self, tables: Sequence[TableShape], compression: float) -> bool:
        other = replace(self, compression=compression)
        return other._divide(tables) is not None  # noqa: SLF001  of this very class

    def _divide(self, tables: Sequence[TableShape]) -> Allocation | None:
        """What :meth:`allocate` returns, or ``None`` if the budget is too small."""
        whole = smallest(
            tables, math.floor(self.whole_fraction * budget_of(tables, self.compression))
        )
        for share in (self.weight_fraction, self.weight_fraction / 4, 0.0):
            if allocation := self._divide_sharing(tables, whole, share):
                return allocation
        return None

    def _divide_sharing(
        self, tables: Sequence[TableShape], whole: Set[str], weight_share: float
    ) -> Allocation | None:
        """The same with some tables kept whole, and the weights' share of the rest."""
        if self.num_shards is not None:
            return self._divide_into(tables, whole, self.num_shards, weight_share)
        for num_shards in _NUM_SHARDS:
            allocation = self._divide_into(tables, whole, num_shards, weight_share)
            if allocation and (
                not allocation.tracked or allocation.hot_rows_per_shard >= _FAIR_HOT_ROWS
            ):
                return allocation
        few = (self._divide_into(tables, whole, count, weight_share) for count in _FEW_SHARDS)
        return next((allocation for allocation in few if allocation), None)

    def _divide_into(
        self, tables: Sequence[TableShape], whole: Set[str], num_shards: int, weight_share: float
    ) -> Allocation | None:
        """The same with so many virtual shards."""
        row_bytes = tables[0].row_bytes if tables else 0
        budget = budget_of(tables, self.compression)
        rest = [table for table in tables if table.name not in whole]
        shared = {table.name: table.num_embeddings for table in tables if table.name in whole}
        left = budget - sum(shared.values()) * row_bytes
        dense = sum(table.dense_bytes for table in tables)
        if not rest:
            return rows_alone(tables, shared, row_bytes)
        fixed = num_shards * (SHARD_BYTES + TABLE_STATISTICS_BYTES * len(rest))
        weights = self._weights(weight_share * (left // num_shards))
        left -= num_shards * weights * WEIGHT_BYTES
        available = (self.hot_fraction * left - fixed) / num_shards
        hot_rows = self._hot_rows(available, row_bytes)
        buckets = math.ceil(hot_rows * self.slots_per_hot_row / BUCKET_SLOTS)
        left -= fixed + num_shards * self._pool_bytes(hot_rows, buckets, row_bytes)
        rows = math.floor(left / row_bytes)
        second_rows = math.floor(self.second_rows * max(0, rows) / num_shards)
        rows -= num_shards * second_rows
        if hot_rows < 1 or rows < len(rest):
            return None
        shared |= split_rows(rest, rows, exponent=SHARED_ROWS_EXPONENT)
        got_all = {table.name for table in rest if shared[table.name] == table.num_embeddings}
        if got_all:
            # Hot rows would be wasted on tables whose ids have a row each.
            return self._divide_into(tables, whole | got_all, num_shards, weight_share)
        memory = MemoryBreakdown(
            shared_bytes=(sum(shared.values()) + num_shards * second_rows) * row_bytes
            + num_shards * weights * WEIGHT_BYTES,
            hot_bytes=num_shards * hot_rows * row_bytes,
            sketch_bytes=num_shards * buckets * BUCKET_SLOTS * SLOT_BYTES + fixed,
            map_bytes=num_shards * hot_rows * OWNER_BYTES,
            dense_bytes=dense,
        )
        return Allocation(
            shared_rows=MappingProxyType({table.name: shared[table.name] for table in tables}),
            memory=memory,
            num_shards=num_shards,
            hot_rows_per_shard=hot_rows,
            second_rows_per_shard=second_rows,
            buckets_per_shard=buckets,
            weights_per_shard=weights,
            tracked=tuple(table.name for table in rest),
        )

    def _weights(self, available: float) -> int:
        """Weights of a virtual shard that has so many bytes for them."""
        if self.weight_hashes == 0:
            return 0
        return whole_weights(math.floor(available / WEIGHT_BYTES), WEIGHTS_PER_LINE)

    @staticmethod
    def _pool_bytes(hot_rows: int, buckets: int, row_bytes: int) -> int:
        """Bytes of a virtual shard that grow with its hot rows."""
        return hot_rows * (row_bytes + OWNER_BYTES) + buckets * BUCKET_SLOTS * SLOT_BYTES

    def _hot_rows(self, available: float, row_bytes: int) -> int:
        """Most hot rows of a virtual shard whose rows, owners and sketch fit ``available``."""
        per_row = row_bytes + OWNER_BYTES + self.slots_per_hot_row * SLOT_BYTES
        hot_rows = max(0, math.floor(available / per_row))
        while hot_rows > 0:
            buckets = math.ceil(hot_rows * self.slots_per_hot_row / BUCKET_SLOTS)
            if self._pool_bytes(hot_rows, buckets, row_bytes) <= available:
                break
            hot_rows -= 1
        return hot_rows
