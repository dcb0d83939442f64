"""Pooled lookups of a group of compressed tables through one stock TBE.

Shape legend: N ids, F features, B samples, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.hot_rows import HotRowPool
from torchrec_cafe.tables.rows import BagRows, RowLookup, SharedRows, on_gradient
from torchrec_cafe.tables.state import ShardedState
from torchrec_cafe.tables.touched import TouchedRows


class CompressedBags(nn.Module):
    """Embedding bags of a group of compressed tables, pooled by sum.

    Args:
        rows: finds the rows of an id.
        tbe: holds the rows.

    Attributes:
        touched: notes the rows that are trained; ``None``: nobody wants to know.
    """

    def __init__(self, rows: RowLookup, tbe: RowRangeTBE) -> None:
        """Join the two; see the class."""
        super().__init__()
        self.rows = rows
        self.tbe = tbe
        self.touched: TouchedRows | None = None

    @property
    def pool(self) -> HotRowPool | None:
        """The pool of hot rows, if the tables have one."""
        return self.rows.pool if isinstance(self.rows, SharedRows) else None

    @property
    def state(self) -> ShardedState | None:
        """What the tables keep besides rows."""
        return self.rows.state

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Look up and pool.

        Args:
            ids: int64 ``[N]``, mixed ids relative to the first of this rank, feature-major.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            weights: float32 ``[N]``, factor of each id's rows in its bag's sum.

        Returns:
            ``[B, F * D]``, or what :meth:`RowLookup.by_sample` says; in training mode its gradient
            feeds the sketch.
        """
        self.settle()
        if not torch.is_grad_enabled():
            return self.rows.infer(ids, offsets, weights, self.tbe)
        found = self.rows(ids, offsets, weights)
        return self.rows.by_sample(self._look_up(found), found.scales)

    def unpooled(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Look up each id by itself.

        Args:
            ids: as :meth:`forward` takes them.
            offsets: as :meth:`forward` takes them.

        Returns:
            ``[N, D]``, in the order of the ids; in training mode its gradient feeds the sketch.
        """
        self.settle()
        return self._look_up(self.rows.unpooled(ids, offsets))

    def _look_up(self, found: BagRows) -> Tensor:
        """The rows of each bag, added up; one row a bag."""
        if self.touched is not None and torch.is_grad_enabled():
            self.touched.mark(found.rows)
        pooled = self.tbe.pool(found.rows, found.offsets, found.factors)
        if found.learn is not None and pooled.requires_grad:
            on_gradient(pooled, found.learn)
        return pooled

    def settle(self) -> None:
        """Apply what the last step has taught; see :meth:`HotRowPool.settle`."""
        pool = self.pool
        if pool is not None and pool.unsettled:  # the rows are asked for only then
            with record_function("CompressedBags.settle"):
                pool.settle(self.tbe.physical_tensors(), self.touched)
