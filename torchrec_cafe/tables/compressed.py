"""Pooled lookups of a group of compressed tables through one stock TBE.

Shape legend: N ids, F features, B samples, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_cafe.ops import (
    TABLE_COLUMNS,
    HotRows,
    Remapped,
    first_mixed_id,
    remap,
)
from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.hot_rows import HotRowPool, PoolLayout


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """Where a rank's part of a table lies.

    Attributes:
        name: name of the table.
        num_ids: rows of the uncompressed table.
        shared_rows: rows that its ids share, over all ranks.
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


class CompressedBags(nn.Module):
    """Embedding bags of a group of compressed tables, pooled by sum.

    Args:
        tables: the tables, in the order of the TBE's row ranges.
        pool: where the hot rows lie, or ``None``; they are the last row range.
        tbe: the rows.
        device: device of the ids.
    """

    _tables: Tensor

    def __init__(
        self,
        tables: Sequence[TableLayout],
        pool: PoolLayout | None,
        tbe: RowRangeTBE,
        device: torch.device,
    ) -> None:
        """Lay out the tables; see the class."""
        super().__init__()
        self.tbe = tbe
        features: list[tuple[int, ...]] = []
        tracked: dict[int, tuple[int, ...]] = {}
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
            features += [columns] * table.num_features
            if table.index >= 0:
                tracked[table.index] = columns
        self.register_buffer(
            "_tables",
            torch.tensor(features, dtype=torch.int64, device=device).view(-1, len(TABLE_COLUMNS)),
            persistent=False,
        )
        self.pool: HotRowPool | None = None
        if pool is not None:
            rows = [tracked[index] for index in range(len(tracked))]
            self.pool = HotRowPool(
                pool,
                torch.tensor(rows, dtype=torch.int64, device=device),
                [columns[TABLE_COLUMNS.index("index")] for columns in features],
            )
        self._no_hot_rows = HotRows.none(device)

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Look up and pool.

        Args:
            ids: int64 ``[N]``, mixed ids relative to the first of this rank, feature-major.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            weights: float32 ``[N]``, factor of each row in its bag's sum.

        Returns:
            ``[B, F * D]``; in training mode its gradient feeds the sketch.
        """
        self.settle()
        hot = self._no_hot_rows if self.pool is None else self.pool.hot_rows()
        remapped = remap(ids, offsets, self._tables, hot)
        weights = None if weights is None else weights.index_select(0, remapped.source)
        pooled = self.tbe(
            indices=remapped.rows, offsets=remapped.offsets, per_sample_weights=weights
        )
        if self.pool is not None and self.training and pooled.requires_grad:
            detached = None if weights is None else weights.detach()
            pooled.register_hook(lambda grad: self._learn(grad, remapped, detached))
        num_features = self._tables.shape[0]
        batch_size = (offsets.numel() - 1) // num_features
        return pooled.view(batch_size, num_features * pooled.shape[1])

    def settle(self) -> None:
        """Apply what the last step has taught; see :meth:`HotRowPool.settle`."""
        if self.pool is not None:
            self.pool.settle(self.tbe.physical_tensors())

    @torch.no_grad()
    def _learn(self, grad: Tensor, remapped: Remapped, weights: Tensor | None) -> None:
        """Importance of an occurrence: norm of its bag's gradient, times its weight."""
        assert self.pool is not None
        norms = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32)
        norms = self.pool.normalise(norms.view(-1, self._tables.shape[0])).flatten()
        importance = norms.index_select(0, remapped.bags)
        if weights is not None:
            importance = importance * weights.abs()
        self.pool.learn(remapped.keys, remapped.shards, importance)
