"""From the ids of a batch to the physical rows that its bags sum up.

Shape legend: N ids, F features, B samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

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
from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.hot_rows import HotRowPool, PoolLayout
from torchrec_cafe.tables.state import JointState, ShardedState
from torchrec_cafe.tables.weights import IdFactors

# Hot ids train their factor in one step of so many. Most lookups are theirs, so that in every step
# their factors would cost more than all others; and rows of their own learn without.
HOT_FACTOR_STEPS = 4


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


def table_columns(tables: Sequence[TableLayout], device: torch.device) -> Tensor:
    """The tables as the operators take them, int64 ``[F, 5]``.

    Args:
        tables: the tables, in the order of their row ranges.
        device: of the result.
    """
    rows: list[tuple[int, ...]] = []
    row = 0
    for table in tables:
        columns = (
            table.num_ids,
            table.shared_rows,
            # A table by quotients lies on one rank; to those after it, it begins where it ends.
            min(first_mixed_id(table.first_row, table.num_ids, table.shared_rows), table.num_ids),
            row - table.first_row,
            table.index,
        )
        row += table.num_rows
        rows += [columns] * table.num_features
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, len(TABLE_COLUMNS))


class BagRows(NamedTuple):
    """What a TBE is to look up.

    Attributes:
        rows: int64 ``[M]``, physical rows.
        offsets: int64 ``[B * bags_per_sample + 1]``, where each bag starts in ``rows``.
        factors: float32 ``[M]``, what each row is multiplied by; ``None``: all one.
        learn: called in backward with the gradient of the pooled bags, before the rows are updated;
            see :func:`on_gradient`. ``None``: nothing is learned from it.
        scales: float32 ``[B]``, goes out as one more column of each sample; ``None``: none does.
    """

    rows: Tensor
    offsets: Tensor
    factors: Tensor | None
    learn: Callable[[Tensor], None] | None = None
    scales: Tensor | None = None


def on_gradient(tensor: Tensor, learn: Callable[[Tensor], None]) -> None:
    """Have something learned from a tensor's gradient; what is done then has no gradient itself.

    Args:
        tensor: requires a gradient.
        learn: called in backward with the gradient, float32 and contiguous.
    """

    def hook(grad: Tensor) -> None:
        if not torch.is_grad_enabled():  # as ever, unless backward is differentiated itself
            learn(grad.float().contiguous())
            return
        with torch.no_grad():
            learn(grad.float().contiguous())

    tensor.register_hook(hook)


def feature_starts(offsets: Tensor, num_features: int) -> Tensor:
    """Where each feature's ids start: int64 ``[F + 1]``.

    Args:
        offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
        num_features: F, >= 1.
    """
    samples = (offsets.numel() - 1) // num_features
    if samples == 0:
        return offsets.new_zeros(num_features + 1)
    return offsets[::samples].contiguous()


def by_id(found: Lookups, num_ids: int) -> Lookups:
    """The same rows, in a bag of its own for each id.

    Args:
        found: rows in the order of their ids, at least one of each.
        num_ids: N.
    """
    ids = torch.arange(num_ids + 1, dtype=torch.int32, device=found.rows.device)
    if len(found.rows) == num_ids:
        return found._replace(offsets=ids.long())
    return found._replace(offsets=torch.searchsorted(found.source, ids))


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
        self.register_buffer("_tables", table_columns(tables, device), persistent=False)

    @property
    def num_features(self) -> int:
        """Features of a batch."""
        return self._tables.shape[0]

    @property
    def bags_per_sample(self) -> int:
        """Bags of a sample: one a feature, unless features are pooled together."""
        return self.num_features

    @property
    def state(self) -> ShardedState | None:
        """What it keeps besides the rows."""
        return None

    def by_sample(self, pooled: Tensor, scales: Tensor | None) -> Tensor:
        """What a sample looks up, side by side.

        Args:
            pooled: ``[B * bags_per_sample, D]``.
            scales: of :class:`BagRows`.

        Returns:
            ``[B, bags_per_sample * D]``, with the scales as one more column.
        """
        bags = self.bags_per_sample
        samples = pooled.view(pooled.shape[0] // bags, bags * pooled.shape[1])
        if scales is None:
            return samples
        return torch.cat([samples, scales.to(samples.dtype).unsqueeze(1)], 1)

    @abstractmethod
    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> BagRows:
        """Find the rows.

        Args:
            ids: int64 ``[N]``, mixed ids relative to the first of this rank, feature-major.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            weights: float32 ``[N]``, factor of each id's rows in its bag's sum; ``None``: all one.
        """

    @abstractmethod
    def unpooled(self, ids: Tensor, offsets: Tensor) -> BagRows:
        """Find the rows of each id by itself.

        Args:
            ids: as :meth:`forward` takes them.
            offsets: as :meth:`forward` takes them.

        Returns:
            Bag ``i`` has the rows of ``ids[i]``; ``learn`` takes the gradient ``[N, D]``.
        """

    def infer(
        self, ids: Tensor, offsets: Tensor, weights: Tensor | None, tbe: RowRangeTBE
    ) -> Tensor:
        """Pool the bags where no gradient is wanted.

        Args:
            ids: as :meth:`forward` takes them.
            offsets: as :meth:`forward` takes them.
            weights: as :meth:`forward` takes them.
            tbe: holds the rows.

        Returns:
            As :meth:`by_sample`, in the TBE's output dtype.
        """
        found = self(ids, offsets, weights)
        pooled = tbe(indices=found.rows, offsets=found.offsets, per_sample_weights=found.factors)
        return self.by_sample(pooled, found.scales)


@final
class SharedRows(RowLookup):
    """An id has its own hot row, or one that it shares, or a second one besides.

    Args:
        tables: the tables, in the order of the TBE's row ranges.
        pool: where the hot rows lie, or ``None``; they are the last row range.
        device: device of the ids.
        factors: scales the rows of each id that the pool tracks; ``None``: nothing does.

    Attributes:
        pool: decides which ids own a row; ``None`` without hot rows.
        factors: as given.
    """

    _tracked: Tensor
    _all: Tensor

    def __init__(
        self,
        tables: Sequence[TableLayout],
        pool: PoolLayout | None,
        device: torch.device,
        factors: IdFactors | None = None,
    ) -> None:
        """Lay out the tables; see the class."""
        super().__init__(tables, device)
        self.factors = factors
        # As operators take features: below 0 are those that are not tracked.
        self.register_buffer("_tracked", self._tables[:, -1].contiguous(), persistent=False)
        self.register_buffer("_all", self._tables.new_zeros(1), persistent=False)
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

    @property
    def state(self) -> ShardedState | None:
        """The pool's, and the weights'."""
        if self.pool is None or self.factors is None:
            return self.pool
        return JointState([self.pool, self.factors.weights])

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> BagRows:
        """Find the rows; see the base class."""
        scaled = weights is not None or self.factors is not None
        looked = self._look(ids, offsets, weights, with_source=scaled)
        return self._bag_rows(looked, lambda grad: self._learn(grad, offsets, looked))

    def unpooled(self, ids: Tensor, offsets: Tensor) -> BagRows:
        """Find the rows of each id; see the base class."""
        starts = feature_starts(offsets, self.num_features)  # the rows then come as the ids do
        looked = self._look(ids, starts, None, with_source=True)
        looked = looked._replace(found=by_id(looked.found, len(ids)))
        samples = (offsets.numel() - 1) // self.num_features
        return self._bag_rows(looked, lambda grad: self._learn_unpooled(grad, samples, looked))

    def _look(
        self, ids: Tensor, offsets: Tensor, weights: Tensor | None, *, with_source: bool
    ) -> _Looked:
        hot = self._no_hot_rows if self.pool is None else self.pool.hot_rows()
        batch = remap(ids, offsets, self._tables, hot, with_source=with_source)
        found = Lookups(batch.rows, batch.offsets, batch.source)
        if hot.rows.second_rows_per_shard > 0:
            found = add_second_rows(batch, hot.rows)
        of_rows = None if weights is None else weights.index_select(0, found.source)
        if self.factors is not None:
            own = self.factors.of(batch, found.source)
            of_rows = own if of_rows is None else own * of_rows
        given = None if weights is None else weights.detach()
        return _Looked(batch, found, of_rows, given)

    def _bag_rows(self, looked: _Looked, learn: Callable[[Tensor], None]) -> BagRows:
        learns = self.factors is not None or (self.pool is not None and self.training)
        rows, offsets, _ = looked.found
        return BagRows(rows, offsets, looked.factors, learn if learns else None)

    def _learn(self, grad: Tensor, offsets: Tensor, looked: _Looked) -> None:
        pool, factors = self.pool if self.training else None, self.factors
        batch, found, _, given = looked
        if pool is not None and factors is not None and pool.learns_from_gradients:
            scaled = factors.scaled(found, self._teaching(batch, pool.steps + 1))
            factors.weights.train(*pool.learn_scaled(grad, offsets, batch, given, scaled))
            return
        if pool is not None:
            pool.learn(grad, offsets, batch, given)
        self._learn_factors(grad, looked, self._tracked, pool)

    def _learn_unpooled(self, grad: Tensor, samples: int, looked: _Looked) -> None:
        pool = self.pool if self.training else None
        if pool is not None:
            pool.learn_unpooled(grad, samples, looked.batch)
        self._learn_factors(grad, looked, self._all, pool)

    def _learn_factors(
        self, grad: Tensor, looked: _Looked, features: Tensor, pool: HotRowPool | None
    ) -> None:
        if self.factors is None:
            return
        batch, found, _, given = looked
        # Outside of training no steps are counted: all ids learn.
        shards = batch.shards if pool is None else self._teaching(batch, pool.steps)
        scaled = self.factors.scaled(found, shards)
        gradients = self.factors.gradients(grad, scaled, batch.keys, given, features)
        self.factors.weights.train(*gradients)

    @staticmethod
    def _teaching(batch: Remapped, step: int) -> Tensor:
        """The shards of the ids whose factor is trained in a step, counted from 1."""
        return batch.cold_shards if step % HOT_FACTOR_STEPS else batch.shards


class _Looked(NamedTuple):
    """What was looked up, the factor of each row, and the user's factor of each id."""

    batch: Remapped
    found: Lookups
    factors: Tensor | None
    given: Tensor | None


@final
class QuotientRemainderRows(RowLookup):
    """An id has a row for its remainder and one for its quotient."""

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> BagRows:
        """Find the rows; see the base class."""
        found = quotient_remainder(ids, offsets, self._tables)
        factors = None if weights is None else weights[found.source]
        return BagRows(found.rows, found.offsets, factors)

    def unpooled(self, ids: Tensor, offsets: Tensor) -> BagRows:
        """Find the rows of each id; see the base class."""
        starts = feature_starts(offsets, self.num_features)
        found = by_id(quotient_remainder(ids, starts, self._tables), len(ids))
        return BagRows(found.rows, found.offsets, None)
