"""Fills compressed tables with the rows of uncompressed ones.

Shape legend: N ids, D columns, C columns of weights and optimizer states together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchrec_cafe.ops import SLOTS, HotRows, Remapped, observe, rebalance, remap
from torchrec_cafe.tables.compressed import CompressedBags
from torchrec_cafe.tables.hot_rows import HotRowPool
from torchrec_cafe.tables.rows import SharedRows, TableLayout, table_columns

# A key of a pool: the number of the table above, the mixed id below; see csrc/row_map.h.
_ID_BITS = 48


class Counted(NamedTuple):
    """Ids of a table that were counted, each once.

    Attributes:
        ids: int64 ``[N]``, mixed ids less the first of this rank.
        lookups: float64 ``[N]``, of each.
    """

    ids: Tensor
    lookups: Tensor


@final
class GroupFiller:
    """Fills the tables of a group on a rank.

    Args:
        bags: of ``Cafe`` or ``Hash`` tables.
        tables: the tables, in the order of their row ranges.
    """

    def __init__(self, bags: CompressedBags, tables: Sequence[TableLayout]) -> None:
        """Note the tables; see the class."""
        assert isinstance(bags.rows, SharedRows)
        self._lookup = bags.rows
        self._tensors = bags.tbe.physical_tensors()
        self._tables = [dataclasses.replace(table, num_features=1) for table in tables]
        self._columns = table_columns(self._tables, self._tensors[0].device)

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self._tensors[0].device

    def clear(self) -> None:
        """Zero all rows and states, and forget what the pool knows."""
        for tensor in self._tensors:
            tensor.zero_()
        if self._lookup.pool is not None:
            self._lookup.pool.clear()
        if self._lookup.factors is not None:
            self._lookup.factors.weights.reset()

    def choose_hot(self, counted: Mapping[str, Counted], total: float) -> None:
        """Let the pool know the most frequent ids, as if it had seen the lookups of a while.

        A score is what the sketch would hold had it watched lookups at these frequencies for as
        long as it remembers, or for as long as there were any, one lookup a bag. The most frequent
        ids of each virtual shard get its rows; the next fill the other slots.

        Args:
            counted: by table; those that the pool does not track are passed over.
            total: lookups of all tracked tables, on all ranks.
        """
        pool = self._lookup.pool
        if pool is None or not counted:
            return
        tracked = [
            (counted[table.name] if table.index >= 0 and table.name in counted else None)
            for table in self._tables
        ]
        empty = Counted(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))
        parts = [empty if part is None else part for part in tracked]
        sizes = torch.tensor([0, *(len(part.ids) for part in parts)])
        batch = remap(
            torch.cat([part.ids for part in parts]).to(self.device),
            sizes.cumsum(0).to(self.device),
            self._columns,
            pool.hot_rows(),
        )
        lookups = torch.cat([part.lookups for part in parts]).to(self.device)
        scores = lookups * min(1.0, _memory(pool) / max(total, 1.0))
        self._observe(pool, batch, scores.float())

    def _observe(self, pool: HotRowPool, batch: Remapped, scores: Tensor) -> None:
        layout, kind = pool.layout, pool.layout.kind
        best_first = scores.argsort(descending=True, stable=True)
        order = best_first[batch.shards[best_first].argsort(stable=True)]
        shards = batch.shards[order].long()
        sizes = torch.bincount(shards + 1, minlength=layout.shards_held + 1)  # -1: not tracked
        rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[shards + 1]
        hot = layout.rows.hot_rows_per_shard
        everyone = torch.arange(layout.shards_held, device=order.device)
        # Hot ids first: once they own rows, the others cannot wear their slots off.
        for first, last, num_medium in (
            (0, hot, 0),
            (hot, layout.buckets_per_shard * SLOTS, layout.num_medium),
        ):
            chosen = order[(rank >= first) & (rank < last) & (shards >= 0)]
            chosen = chosen[scores[chosen].argsort(descending=True, stable=True)]
            observe(pool.sketch, batch.keys[chosen], batch.shards[chosen], scores[chosen])
            rebalance(
                pool.sketch,
                everyone,
                min_score=kind.threshold or 0.0,
                hysteresis=kind.hysteresis,
                num_medium=num_medium,
            )
        # These were no steps of training.
        pool.sketch.counters.zero_()
        pool.reload()

    def table(self, name: str) -> TableFiller:
        """What fills a table; one at a time.

        Args:
            name: of the table.
        """
        numbers = [number for number, table in enumerate(self._tables) if table.name == name]
        columns = self._columns[numbers]
        return TableFiller(self._lookup, self._tensors, self._tables[numbers[0]], columns)


def _memory(pool: HotRowPool) -> float:
    """How many bags the sketch remembers: what all that came before counts together."""
    hot_rows = pool.layout.num_shards * pool.layout.rows.hot_rows_per_shard
    return pool.layout.kind.half_life * hot_rows / math.log(2)


@final
class TableFiller:
    """Fills one table: hot ids keep their rows, the others are averaged.

    Args:
        lookup: of the group.
        tensors: physical table and optimizer states; mutated.
        table: the table.
        columns: int64 ``[1, 5]``, the table as operators take it.
    """

    def __init__(
        self, lookup: SharedRows, tensors: Sequence[Tensor], table: TableLayout, columns: Tensor
    ) -> None:
        """Nothing is filled yet; see the class."""
        self._lookup = lookup
        self._tensors = tensors
        self._table = table
        self._columns = columns
        self._begin = int(columns[0, 3]) + table.first_row  # the rank's first row of the table
        self._widths = [tensor[:1].numel() for tensor in tensors]
        self._sums: Tensor | None = None
        self._weights = torch.zeros(table.num_rows, dtype=torch.float64, device=columns.device)

    @property
    def _pool(self) -> HotRowPool | None:
        return self._lookup.pool if self._table.index >= 0 else None

    def add(self, ids: Tensor, values: Tensor, weights: Tensor) -> None:
        """Take in some rows of the uncompressed table; each id once.

        Args:
            ids: int64 ``[N]``, mixed ids less the first of this rank.
            values: float32 ``[N, C]``, weights, and optimizer states if they are to be filled.
            weights: float64 ``[N]``, > 0, of each id in the mean of those that share a row.
        """
        if self._sums is None:
            shape = (self._table.num_rows, values.shape[1])
            self._sums = torch.zeros(shape, device=values.device)
        hot = HotRows.none(ids.device) if self._pool is None else self._pool.hot_rows()
        starts = torch.tensor([0, len(ids)], device=ids.device)
        batch = remap(ids, starts, self._columns, hot, with_source=False)
        rows = batch.rows
        if self._pool is not None:
            own = rows >= self._pool.layout.rows.offset
            self._add_own(batch, values, own.nonzero().squeeze(1))
            others = (~own).nonzero().squeeze(1)
            rows, values = rows[others], values.index_select(0, others)
            weights = weights[others]
        if self._table.shared_rows == self._table.num_ids:
            weights = torch.ones_like(weights)  # a row an id: no rounding
        shared = rows - self._begin
        self._sums.index_add_(0, shared, values * weights.float().unsqueeze(1))
        self._weights.index_add_(0, shared, weights)

    def _add_own(self, batch: Remapped, values: Tensor, which: Tensor) -> None:
        """Write the rows of hot ids."""
        values = values.index_select(0, which)
        if self._lookup.factors is not None:
            hot = batch._replace(keys=batch.keys[which], shards=batch.shards[which])
            factors = self._lookup.factors.of(hot).unsqueeze(1)
            values[:, : self._widths[0]] /= factors  # lookups multiply by it
        self._write(batch.rows[which], values)

    def finish(self) -> None:
        """Write the means; a row whose ids are all hot becomes the mean of theirs."""
        if self._sums is None or len(self._sums) == 0:
            return
        self._add_hot()
        found = self._weights > 0
        self._sums[found] /= self._weights[found].float().unsqueeze(1)
        self._write(torch.arange(len(found), device=found.device) + self._begin, self._sums)

    def _write(self, rows: Tensor, values: Tensor) -> None:
        """Write columns side by side to the tensors that they belong to."""
        at = 0
        for tensor, width in zip(self._tensors, self._widths, strict=True):
            if at == values.shape[1]:
                return  # no states are filled
            part = values[:, at : at + width].view(-1, *tensor.shape[1:])
            tensor[rows] = part.to(tensor.dtype)
            at += width

    def _add_hot(self) -> None:
        """Let hot ids stand in for shared rows that have no other id."""
        pool = self._pool
        assert self._sums is not None
        if pool is None:
            return
        shard, row = (pool.sketch.owners >= 0).nonzero(as_tuple=True)
        slots = pool.sketch.owners[shard, row].long()
        keys = pool.sketch.keys.flatten(1)[shard, slots]
        scores = pool.sketch.scores.flatten(1)[shard, slots].double()
        physical = pool.layout.rows.offset + shard * pool.layout.rows.rows_per_shard + row
        ids = keys & ((1 << _ID_BITS) - 1)
        shared = ids * self._table.shared_rows // self._table.num_ids - self._table.first_row
        mine = keys >> _ID_BITS == self._table.index
        shared = torch.where(mine, shared, 0)
        mine &= self._weights[shared] == 0
        shared, scores, physical = shared[mine], scores[mine], physical[mine]
        states = zip(self._tensors, self._widths, strict=True)
        parts = [tensor[physical].float().view(len(physical), width) for tensor, width in states]
        values = torch.cat(parts, 1)[:, : self._sums.shape[1]]
        self._sums.index_add_(0, shared, values * scores.float().unsqueeze(1))
        self._weights.index_add_(0, shared, scores)
