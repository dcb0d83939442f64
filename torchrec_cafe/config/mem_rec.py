"""What MEM-REC tables cost. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torchrec_cafe.config.budget import (
    TableKind,
    budget_of,
    check_arguments,
    check_compression,
    too_small,
)
from torchrec_cafe.config.memory import (
    MAX_HASHES,
    WEIGHT_BYTES,
    WEIGHTS_PER_ROW,
    Allocation,
    MemoryBreakdown,
    TableShape,
    whole_weights,
)

#: What has one vector.
PER = ("token", "sample")
# Virtual shards, unless a number is asked for: the first that leaves each so many token rows, since
# ids collide within their shard. Small tables have a few, so that a few ranks can share them.
_NUM_SHARDS = ((64, 64), (32, 64), (16, 64), (8, 8), (4, 8), (2, 8), (1, 1))

# Where many ids share a row, what they differ in is worth more than what they share, and a weight
# costs less than a row: on the accuracy study's data sets from 100x on. At 10x it is even.
_MORE_WEIGHTS_FROM = 50.0
_MORE_WEIGHTS = 0.6


@dataclass(frozen=True, kw_only=True)
class MemRec(TableKind):
    """MEM-REC (ACML 2023): two tables, small enough for a cache, replace all tables of a group.

    An id has ``num_hashes`` rows of the token table, which are summed, and ``num_weight_hashes``
    weights, whose sum scales them: ``z = alpha * M phi``. Both are trained. A row or weight that
    two hash functions hit counts once (a Bloom filter's bit is set or not). All tables of an
    ``EmbeddingBagCollection`` with equal kinds share the two.

    Give ``compression`` or ``num_token_rows``.

    Attributes:
        compression: dense weight bytes divided by resident bytes (token rows and weights), >= 1.
        num_token_rows: rows of the token table, >= 1; rounded down to what virtual shards of equal
            size can hold.
        num_hashes: rows of an id, in [1, 16]. The paper: 2 to 4 for small models, 1 or 2 for large.
        num_weight_hashes: weights of an id, in [1, 16]. The paper: 2 to 8 for small models, 2 to 4
            for large.
        weight_fraction: share of the bytes of both tables that goes to weights, in (0, 1).
            ``None``: .6 with a ``compression`` of 50 or more, where it wins much; else as many
            weights as token rows, as in the paper.
        per: ``"token"``: every id has rows and a factor, and a feature pools its ids. ``"sample"``:
            the ids of all features of a sample that have the kind set bits together, so that the
            sample has one vector, which every such feature gives; features are neither weighted nor
            pooled by mean. The paper's equations can be read as either.
        num_shards: virtual shards of both tables, fixed for the life of a checkpoint; at least the
            number of ranks that the tables are ever spread over. The rows of an id lie in one
            shard. ``None``: 64, fewer for small tables.
        pool: name of the pool: tables whose kinds differ in nothing else share nothing either.
    """

    compression: float | None = None
    num_token_rows: int | None = None
    num_hashes: int = 1
    num_weight_hashes: int = 4
    weight_fraction: float | None = None
    per: str = "token"
    num_shards: int | None = None
    pool: str = ""

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if an argument is out of range.
        """
        if (self.compression is None) == (self.num_token_rows is None):
            raise ValueError(
                "give compression or num_token_rows, and not both: got "
                f"compression={self.compression} and num_token_rows={self.num_token_rows}"
            )
        if self.compression is not None:
            check_compression(self.compression)
        least = self.num_shards or 1
        checks = {
            "num_token_rows": (
                f"at least {'num_shards, ' if self.num_shards else ''}{least}",
                self.num_token_rows is None or self.num_token_rows >= least,
            ),
            "num_hashes": (f"in [1, {MAX_HASHES}]", 1 <= self.num_hashes <= MAX_HASHES),
            "num_weight_hashes": (
                f"in [1, {MAX_HASHES}]",
                1 <= self.num_weight_hashes <= MAX_HASHES,
            ),
            "weight_fraction": (
                "in (0, 1) or None",
                self.weight_fraction is None or 0 < self.weight_fraction < 1,
            ),
            "per": (f"one of {PER}", self.per in PER),
            "num_shards": (
                "in [1, 65536] or None",
                self.num_shards is None or 1 <= self.num_shards <= 65536,
            ),
        }
        check_arguments(self, checks)

    def allocate(self, tables: Sequence[TableShape]) -> Allocation:
        """Token rows and weights of a group.

        Args:
            tables: tables of equal dim and dtype that share the two.

        Raises:
            ValueError: if the budget leaves a virtual shard without a row.
        """
        allocation = self._divide(tables)
        if allocation is None:
            assert self.compression is not None
            raise too_small(tables, self.compression, lambda c: self._fits(tables, c))
        return allocation

    def _fits(self, tables: Sequence[TableShape], compression: float) -> bool:
        other = replace(self, compression=compression)
        return other._divide(tables) is not None  # noqa: SLF001  of this very class

    def _divide(self, tables: Sequence[TableShape]) -> Allocation | None:
        """What :meth:`allocate` returns, or ``None`` if the budget is too small."""
        options = _NUM_SHARDS if self.num_shards is None else ((self.num_shards, 1),)
        for num_shards, least in options:
            rows, weights = self._per_shard(tables, num_shards)
            if rows >= least:
                return _allocation(tables, num_shards, rows, weights)
        return None

    def _per_shard(self, tables: Sequence[TableShape], num_shards: int) -> tuple[int, int]:
        """Token rows and weights of a virtual shard."""
        row_bytes = tables[0].row_bytes
        budget = budget_of(tables, self.compression or 1.0)
        if self.num_token_rows is not None:
            rows = self.num_token_rows // num_shards
            return rows, self._weights(rows, row_bytes)
        available = budget // num_shards
        share = self.weight_share(row_bytes)
        rows = math.floor(available * (1 - share) / row_bytes + 1e-6)  # of an exact fit, all rows
        while rows > 0 and (
            rows * row_bytes + self._weights(rows, row_bytes) * WEIGHT_BYTES > available
        ):
            rows -= 1
        return rows, self._weights(rows, row_bytes)

    def weight_share(self, row_bytes: int) -> float:
        """Share of the bytes that goes to weights: as given, or what ``None`` stands for.

        Args:
            row_bytes: bytes of a token row, >= 1.
        """
        if self.weight_fraction is not None:
            return self.weight_fraction
        if self.compression is not None and self.compression >= _MORE_WEIGHTS_FROM:
            return _MORE_WEIGHTS
        return WEIGHT_BYTES / (row_bytes + WEIGHT_BYTES)

    def _weights(self, rows: int, row_bytes: int) -> int:
        """Weights of a virtual shard with so many token rows."""
        share = self.weight_share(row_bytes)
        weights = round(rows * row_bytes * share / (1 - share) / WEIGHT_BYTES)
        return whole_weights(weights, WEIGHTS_PER_ROW)


def _allocation(
    tables: Sequence[TableShape], num_shards: int, rows: int, weights: int
) -> Allocation:
    per_shard = rows * tables[0].row_bytes + weights * WEIGHT_BYTES
    names = tuple(table.name for table in tables)
    return Allocation(
        # No rows of their own; ids are told apart by the shard that they belong to.
        shared_rows=MappingProxyType(dict.fromkeys(names, 0)),
        memory=MemoryBreakdown(
            shared_bytes=num_shards * per_shard,
            hot_bytes=0,
            sketch_bytes=0,
            map_bytes=0,
            dense_bytes=sum(table.dense_bytes for table in tables),
        ),
        num_shards=num_shards,
        token_rows_per_shard=rows,
        weights_per_shard=weights,
        tracked=names,
    )
