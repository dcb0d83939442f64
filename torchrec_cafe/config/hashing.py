"""The baselines: tables whose ids share rows by hashing alone. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_cafe.config.budget import (
    TableKind,
    budget_of,
    check_compression,
    check_whole_fraction,
    rows_alone,
    smallest,
    split_rows,
    too_small,
)
from torchrec_cafe.config.memory import Allocation, TableShape

# Tables of at most this many ids, divided by the compression, stay whole under Hash: the rule of
# the CAFE paper's own experiments, for all of its methods.
HASH_WHOLE_IDS = 2000


@dataclass(frozen=True, kw_only=True)
class Hash(TableKind):
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
        check_compression(self.compression)
        check_whole_fraction(self.whole_fraction)

    def allocate(self, tables: Sequence[TableShape]) -> Allocation:
        """Rows of each table: its share of the budget, at least one.

        Args:
            tables: tables of equal dim and dtype that share the budget.

        Raises:
            ValueError: if the budget leaves a table without a row.
        """
        row_bytes = tables[0].row_bytes if tables else 0
        budget = budget_of(tables, self.compression)
        rows = budget // row_bytes
        if rows < len(tables):
            raise too_small(
                tables, self.compression, lambda c: budget_of(tables, c) >= len(tables) * row_bytes
            )
        whole = smallest(tables, math.floor(self.whole_fraction * budget))
        few = HASH_WHOLE_IDS / self.compression
        tiny = [table for table in tables if table.num_embeddings <= few]
        if sum(table.num_embeddings for table in tiny) + len(tables) <= rows:
            whole |= {table.name for table in tiny}
        shared = {table.name: table.num_embeddings for table in tables if table.name in whole}
        rest = [table for table in tables if table.name not in whole]
        shared |= split_rows(rest, rows - sum(shared.values()), exponent=1.0)
        return rows_alone(tables, shared, row_bytes)


def fewest_rows(num_ids: int) -> int:
    """Fewest rows in which the quotient-remainder trick can tell so many ids apart."""
    root = math.isqrt(num_ids - 1) + 1  # rounded up
    return min(divisor + -(-num_ids // divisor) for divisor in {root, max(1, root - 1)})


def remainder_rows(num_ids: int, num_rows: int) -> int:
    """How many of a table's rows are for remainders: as many as leave enough for the quotients.

    Args:
        num_ids: rows of the uncompressed table.
        num_rows: at least :func:`fewest_rows`, at most ``num_ids + 1``.
    """
    estimate = (num_rows + math.isqrt(max(0, num_rows * num_rows - 4 * num_ids))) // 2 + 1
    while estimate > 1 and estimate + -(-num_ids // estimate) > num_rows:
        estimate -= 1
    return min(num_ids, estimate)


@dataclass(frozen=True, kw_only=True)
class QuotientRemainder(TableKind):
    """The quotient-remainder trick (KDD 2020): no two ids have both of their two rows in common.

    A baseline stronger than :class:`Hash` at the price of two lookups an id. It cannot go below
    ``2 * sqrt(num_embeddings)`` rows a table.

    Attributes:
        compression: dense weight bytes divided by resident bytes, >= 1. Tables of an
            ``EmbeddingBagCollection`` with equal kinds share one budget.
    """

    compression: float

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if an argument is out of range.
        """
        check_compression(self.compression)

    def allocate(self, tables: Sequence[TableShape]) -> Allocation:
        """Rows of each table: what it needs, and the rest in proportion to its ids.

        Args:
            tables: tables of equal dim and dtype that share the budget.

        Raises:
            ValueError: if the budget does not let a table tell its ids apart.
        """
        row_bytes = tables[0].row_bytes if tables else 0
        rows = budget_of(tables, self.compression) // row_bytes
        needed = {table.name: fewest_rows(table.num_embeddings) for table in tables}
        if sum(needed.values()) > rows:
            raise too_small(
                tables,
                self.compression,
                lambda c: budget_of(tables, c) // row_bytes >= sum(needed.values()),
            )
        # Tables that want less than they need come first, so that the rest can share what remains.
        left = rows
        ids = sum(table.num_embeddings for table in tables)
        shared: dict[str, int] = {}
        by_want = sorted(tables, key=lambda t: (t.num_embeddings / needed[t.name], t.name))
        for number, table in enumerate(by_want):
            reserved = sum(needed[other.name] for other in by_want[number + 1 :])
            part = min(left * table.num_embeddings // ids, left - reserved)
            part = max(needed[table.name], part)
            given = min(part, table.num_embeddings + 1)
            divisor = remainder_rows(table.num_embeddings, given)
            shared[table.name] = divisor + -(-table.num_embeddings // divisor)
            left -= shared[table.name]
            ids -= table.num_embeddings
        return rows_alone(tables, shared, row_bytes)
