"""Pooled lookups of tables that live elsewhere, through a stock TBE whose rows are slots.

Shape legend: N ids, F features, B samples, D columns.
"""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_cafe.ops import PooledKeys, pool_keys
from torchrec_cafe.tables._fbgemm import SlotTBE
from torchrec_cafe.tables.planned_lookup import (
    LookaheadStatistics,
    PlannedLookup,
    ScratchpadFullError,
)
from torchrec_cafe.tables.row_store import RowStore
from torchrec_cafe.tables.scratchpad import Scratchpad


@dataclass(frozen=True)
class StoredTable:
    """A table of a store.

    Attributes:
        name: name of the table.
        num_rows: its rows on this rank; 0: none.
        num_features: features that look it up.
    """

    name: str
    num_rows: int
    num_features: int


@dataclass(eq=False)
class _Ahead:
    """A batch whose rows are on their way."""

    ids: Tensor
    version: int
    offsets: Tensor
    out_of_range: Tensor
    lookup: PlannedLookup

    def is_of(self, ids: Tensor, offsets: Tensor) -> bool:
        """Whether these are the ids of the batch, in the same memory, which is ours until then.

        A lookup may have them as another view. Empty batches are all the same.
        """
        if ids.shape != self.ids.shape or not torch.equal(offsets, self.offsets):
            return False
        is_same = ids.data_ptr() == self.ids.data_ptr() and _version(ids) == self.version
        return is_same or ids.numel() == 0


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; those of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001


class _Update:
    """The coming update of a lookup; it lives as long as the graph that can bring it about."""

    def __init__(self, bags: LookaheadBags, lookup: PlannedLookup) -> None:
        self._bags = bags
        self._lookup = lookup

    def __call__(self, _grads: Any) -> None:
        """Note that it begins; a hook of the TBE's backward."""
        self._bags.begin_update(self._lookup)


class LookaheadBags(nn.Module):
    """Embedding bags of tables whose rows are in slots only while they are needed.

    The results, and the updates by the TBE's optimizer, are those of the whole tables.

    Args:
        tables: in the order of the features.
        tbe: its rows are the slots.
        store: holds the rows, table after table.
    """

    def __init__(self, tables: Sequence[StoredTable], tbe: SlotTBE, store: RowStore) -> None:
        """Join them; see the class."""
        super().__init__()
        self.tbe = tbe
        self.store = store
        self.names = [table.name for table in tables]
        name = "tables " + ", ".join(repr(table.name) for table in tables)
        self._scratchpad = Scratchpad(tbe.physical_tensors(), store, name)
        self._features = [table.num_features for table in tables]
        ranges, first = [], 0
        for table in tables:
            ranges += [[first, table.num_rows]] * table.num_features
            first += table.num_rows
        self._ranges = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
        self.out_of_range = torch.zeros(len(ranges), dtype=torch.int64)
        self._ahead: deque[_Ahead] = deque()
        self._to_update: dict[PlannedLookup, weakref.ref[_Update]] = {}
        self._updated: list[PlannedLookup] = []  # not released yet

    @property
    def statistics(self) -> LookaheadStatistics:
        """What the scratchpad has done so far; live."""
        return self._scratchpad.statistics

    @property
    def resident_bytes(self) -> int:
        """Bytes of the rows in slots, and of the map; without optimizer state."""
        slots = self.tbe.physical_tensors()[0]
        return slots.numel() * slots.element_size() + self._scratchpad.map_bytes

    def look_ahead(self, ids: Tensor, offsets: Tensor) -> None:
        """Begin to bring the rows of a coming batch in.

        Args:
            ids: int ``[N]``, feature-major, relative to the first row of each table; the same
                memory will be looked up. If it is changed until then, all of this was in vain.
            offsets: int ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
        """
        self._release()
        if any(ahead.is_of(ids, offsets) for ahead in self._ahead):
            return
        self._ahead.append(self._plan(ids, offsets, train=self.training, ahead=True))

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Look up and pool; waits for rows that have not been looked ahead for.

        Args:
            ids: int ``[N]``, feature-major, relative to the first row of each table.
            offsets: int ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            weights: float32 ``[N]``, factor of each id's row in its bag's sum.

        Returns:
            ``[B, F * D]``.

        Raises:
            ScratchpadFullError: if the batch has more rows of one table than slots can be had for.
        """
        self._release()
        batch = self._take(ids, offsets)
        if batch is None:
            batch = self._plan(ids, offsets, train=torch.is_grad_enabled(), ahead=False)
        try:
            pooled = self._pool(self._scratchpad.wait(batch.lookup), batch.lookup.bags, weights)
        except ScratchpadFullError as error:
            if self._release_garbage():
                return self(ids, offsets, weights)
            self.out_of_range += batch.out_of_range
            return self._table_by_table(batch.lookup.bags, weights, error)
        except BaseException:
            self._scratchpad.release(batch.lookup)
            raise
        self.out_of_range += batch.out_of_range
        if pooled.grad_fn is not None:
            update = _Update(self, batch.lookup)
            self._to_update[batch.lookup] = weakref.ref(update)
            pooled.grad_fn.register_prehook(update)
        else:
            self._scratchpad.release(batch.lookup)
        return pooled.view(-1, len(self._ranges) * pooled.shape[1])

    def _pool(self, slots: Tensor, bags: PooledKeys | None, weights: Tensor | None) -> Tensor:
        assert bags is not None  # there are slots
        if weights is not None:
            weights = weights[bags.source]
        return self.tbe.pool(slots, bags.offsets, weights)

    def begin_update(self, lookup: PlannedLookup) -> None:
        """Note that the TBE is about to update the rows of a batch.

        Args:
            lookup: of the batch.

        Raises:
            RuntimeError: if it has done so before: the rows may have left their slots.
        """
        if lookup not in self._to_update:
            raise RuntimeError(
                f"tables {self.names}: the backward pass of a batch can run once only, since it "
                "updates the rows; leave retain_graph out"
            )
        self._scratchpad.begin_update(lookup)
        del self._to_update[lookup]
        self._updated.append(lookup)

    def _table_by_table(
        self, bags: PooledKeys | None, weights: Tensor | None, error: ScratchpadFullError
    ) -> Tensor:
        """Look up a batch with more rows than there are slots: some tables at a time.

        Rows are brought in for the lookup, and once more for the update. The result is that of the
        whole batch to the last bit, since no row is in two parts.
        """
        assert bags is not None  # its rows are known to be too many
        num_samples = (len(bags.offsets) - 1) // len(self._ranges)
        columns = []
        for part in split_by_table(bags, self._features, self._scratchpad.num_slots, error):
            lookup = self._scratchpad.plan(lambda part=part: part, train=False, ahead=False)
            try:
                slots = self._scratchpad.wait(lookup).clone()
                pooled = self._pool(slots, part, weights)
            finally:
                self._scratchpad.release(lookup)
            if pooled.grad_fn is not None:
                again = functools.partial(self._bring_again, part, slots)
                pooled.grad_fn.register_prehook(again)
            columns.append(pooled.view(num_samples, -1))
        return torch.cat(columns, 1)

    def _bring_again(self, part: PooledKeys, slots: Tensor, _grads: Any) -> None:
        """Bring the rows of a part in for its update. They may lie in other slots this time."""
        self._release()  # the part that was updated before this one
        lookup = self._scratchpad.plan(lambda: part, train=True, ahead=False)
        # Autograd has saved the slots for the TBE's backward, and would notice `slots.copy_`.
        slots.data.copy_(self._scratchpad.wait(lookup))
        self._scratchpad.begin_update(lookup)
        self._updated.append(lookup)

    def flush(self) -> None:
        """Write all rows back, before the store is read or changed from outside."""
        self._release()
        self._scratchpad.flush()

    def _plan(self, ids: Tensor, offsets: Tensor, *, train: bool, ahead: bool) -> _Ahead:
        ranges = self._ranges  # the thread that makes the bags must not keep the tables alive
        out_of_range = torch.zeros(len(ranges), dtype=torch.int64)

        def make_bags() -> PooledKeys:
            long = ids.long().contiguous(), offsets.long().contiguous()
            return pool_keys(*long, ranges, out_of_range)

        version, of_bags = _version(ids), offsets.clone()
        lookup = self._scratchpad.plan(make_bags, train=train, ahead=ahead)
        return _Ahead(ids, version, of_bags, out_of_range, lookup)

    def _take(self, ids: Tensor, offsets: Tensor) -> _Ahead | None:
        """The plan of a batch that was looked ahead for; those before it have been left out."""
        if not any(ahead.is_of(ids, offsets) for ahead in self._ahead):
            return None
        while not self._ahead[0].is_of(ids, offsets):
            self._scratchpad.release(self._ahead.popleft().lookup)
        return self._ahead.popleft()

    def _release(self) -> None:
        """Let go of the rows of batches that are updated, or whose graph is gone.

        This is called outside of their backward passes.
        """
        gone = [lookup for lookup, update in self._to_update.items() if update() is None]
        for lookup in (*self._updated, *gone):
            self._scratchpad.release(lookup)
            self._to_update.pop(lookup, None)
        self._updated.clear()

    def _release_garbage(self) -> bool:
        """Let go of the rows of graphs that are gone but for a cycle; says whether there were any.

        Those of TorchRec's collectives hold themselves until they are collected.
        """
        before = len(self._to_update)
        if before > 0:
            gc.collect()
            self._release()
        return len(self._to_update) < before


def split_by_table(
    bags: PooledKeys, features: Sequence[int], num_slots: int, error: ScratchpadFullError
) -> Iterator[PooledKeys]:
    """Cut a batch into parts of whole tables, whose rows fit the slots.

    Args:
        bags: of all features.
        features: of each table; a table's are neighbours.
        num_slots: distinct rows that a part may have.
        error: what to raise if a table has more.
    """
    num_features = sum(features)
    feature_of_bag = torch.arange(len(bags.offsets) - 1) % num_features
    lengths = bags.offsets.diff()
    feature = feature_of_bag.repeat_interleave(lengths)
    first = 0
    taken: list[int] = []  # distinct rows of each table of the part
    ends = list(itertools.accumulate(features))
    for number, end in enumerate(ends):
        begin = end - features[number]
        rows = len(bags.keys[(feature >= begin) & (feature < end)].unique())
        if rows > num_slots:
            raise error
        if sum(taken) + rows > num_slots:
            yield _features_from_to(bags, feature, feature_of_bag, first, begin)
            first, taken = begin, []
        taken.append(rows)
    yield _features_from_to(bags, feature, feature_of_bag, first, num_features)


def _features_from_to(
    bags: PooledKeys, feature: Tensor, feature_of_bag: Tensor, begin: int, end: int
) -> PooledKeys:
    inside = (feature >= begin) & (feature < end)
    bag_inside = (feature_of_bag >= begin) & (feature_of_bag < end)
    offsets = torch.zeros(int(bag_inside.sum()) + 1, dtype=torch.int64)
    torch.cumsum(bags.offsets.diff()[bag_inside], 0, out=offsets[1:])
    return PooledKeys(bags.keys[inside], offsets, bags.source[inside])
