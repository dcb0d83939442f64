"""From the ids of a batch to the physical rows that its bags sum up.

Shape legend: N ids, F features, B samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from torchrec_cafe.ops import (
    TABLE_COLUMNS,
    HotRows,
    Lookups,
    Remapped,
    add_second_rows,
    first_mixed_id,
    quotient_remainder,
    remap,
)
from torchrec_cafe.tables.hot_rows import HotRowPool, PoolLayout


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """Where a rank's part of a table lies.

    Attributes:
        name: name of the table.
        num_ids: rows of the uncompressed table.
        shared_rows: rows that its ids share, over all ranks; of quotient-remainder tables, the
            remainder rows.
        first_row: first shared row of this rank.
        num_rows: shared rows of this rank, >= 0.
        num_features: features that look into the table, >= 1.
        index: number of the table in the pool, or -1: its ids never own a hot row.
    """

    name: str
    num_ids: int
    shared_rows: int
    first_row: int
    num_rows: int
    num_features: int
    index: int


class RowLookup(nn.Module, ABC):
    """Finds the rows of a batch.

    Args:
        tables: the tables, in the order of the TBE's row ranges.
        device: device of the ids.
    """

    _tables: Tensor

    def __init__(self, tables: Sequence[TableLayout], device: torch.device) -> None:
        """Lay out the tables; see the class."""
        super().__init__()
        rows: list[tuple[int, ...]] = []
        row = 0
        for table in tables:
            columns = (
                table.num_ids,
                table.shared_rows,
                first_mixed_id(table.first_row, table.num_ids, table.shared_rows),
                row - table.first_row,
                table.index,
            )
            row += table.num_rows
            rows += [columns] * table.num_features
        self.register_buffer(
            "_tables",
            torch.tensor(rows, dtype=torch.int64, device=device).view(-1, len(TABLE_COLUMNS)),
            persistent=False,
        )

    @property
    def num_features(self) -> int:
        """Features of a batch."""
        return self._tables.shape[0]

    @abstractmethod
    def forward(
        self, ids: Tensor, offsets: Tensor, *, with_source: bool
    ) -> tuple[Lookups, Remapped | None]:
        """Find the rows.

        Args:
            ids: int64 ``[N]``, mixed ids relative to the first of this rank, feature-major.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            with_source: whether the lookups must say which id each row came from.

        Returns:
            What to look up; and what a pool of hot rows learns from, if there is one.
        """


@final
class SharedRows(RowLookup):
    """An id has its own hot row, or one that it shares, or a second one besides.

    Args:
        tables: the tables, in the order of the TBE's row ranges.
        pool: where the hot rows lie, or ``None``; they are the last row range.
        device: device of the ids.
    """

    def __init__(
        self, tables: Sequence[TableLayout], pool: PoolLayout | None, device: torch.device
    ) -> None:
        """Lay out the tables; see the class."""
        super().__init__(tables, device)
        self._no_hot_rows = HotRows.none(device)
        self.pool: HotRowPool | None = None
        if pool is not None:
            columns = self._tables.tolist()
            tracked = {row[-1]: row for row in columns if row[-1] >= 0}
            rows = [tracked[index] for index in range(len(tracked))]
            self.pool = HotRowPool(
                pool,
                torch.tensor(rows, dtype=torch.int64, device=device),
                [row[-1] for row in columns],
            )

    def forward(
        self, ids: Tensor, offsets: Tensor, *, with_source: bool
    ) -> tuple[Lookups, Remapped | None]:
        """Find the rows; see the base class."""
        if self.pool is None:
            hot = self._no_hot_rows
            batch = remap(ids, offsets, self._tables, hot, with_source=with_source)
            return Lookups(batch.rows, batch.offsets, batch.source), None
        layout = self.pool.layout.rows
        hot = self.pool.hot_rows()
        batch = remap(ids, offsets, self._tables, hot, with_source=with_source)
        if layout.second_rows_per_shard > 0:
            return add_second_rows(batch, layout), batch
        return Lookups(batch.rows, batch.offsets, batch.source), batch


@final
class QuotientRemainderRows(RowLookup):
    """An id has a row for its remainder and one for its quotient."""

    def forward(
        self, ids: Tensor, offsets: Tensor, *, with_source: bool
    ) -> tuple[Lookups, Remapped | None]:
        """Find the rows; see the base class."""
        del with_source  # they always say
        return quotient_remainder(ids, offsets, self._tables), None
