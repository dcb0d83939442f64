"""Pooled lookups of tables that live elsewhere, through a stock TBE whose rows are slots.

Shape legend: N ids, F features, B samples, D columns.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Sequence
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
from torchrec_cafe.tables.slot_memory import PlacedBags, slot_memory
from torchrec_cafe.tables.split_batch import split_by_table


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


class _Unchanged:
    """A tensor as it is now, in memory that is not reused as long as this lives."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = _version(tensor)

    def is_(self, other: Tensor) -> bool:
        """Whether another is a view of the same memory, not changed since. Empty ones are equal.

        Values are not compared: those on a device would have to be waited for.
        """
        if other.shape != self._tensor.shape or other.dtype != self._tensor.dtype:
            return False
        is_same = other.data_ptr() == self._tensor.data_ptr() and _version(other) == self._version
        return is_same or other.numel() == 0


@dataclass(eq=False)
class _Ahead:
    """A batch whose rows are on their way."""

    given: tuple[_Unchanged, _Unchanged]
    out_of_range: Tensor
    lookup: PlannedLookup

    def is_of(self, ids: Tensor, bags: Tensor) -> bool:
        """Whether these are the ids of the batch, and what says their bags."""
        return self.given[0].is_(ids) and self.given[1].is_(bags)


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; those of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001


class _Update:
    """The coming update of a lookup; it lives as long as the graph that can bring it about."""

    def __init__(self, bags: LookaheadBags, lookup: PlannedLookup) -> None:
        self._bags = bags
        self._lookup = lookup

    def hook(self, node: Any) -> None:
        """Have the TBE's backward say when it begins, and when it has asked for the update."""
        node.register_prehook(self._begin)
        node.register_hook(self._end)

    def _begin(self, _grads: Any) -> None:
        self._bags.begin_update(self._lookup)

    def _end(self, _grads: Any, _outputs: Any) -> None:
        self._bags.end_update(self._lookup)


class _PartUpdate:
    """The coming update of a part of a batch, whose rows are not in their slots until then.

    Args:
        bags: that it is a part of.
        part: the rows.
        slots: int64 ``[N]``, of each occurrence at the lookup; mutated before the update.
    """

    def __init__(self, bags: LookaheadBags, part: PooledKeys, slots: Tensor) -> None:
        self._bags = bags
        self._part = part
        self._slots = slots
        self._lookup: PlannedLookup | None = None

    def hook(self, node: Any) -> None:
        """See :meth:`_Update.hook`."""
        node.register_prehook(self._begin)
        node.register_hook(self._end)

    def _begin(self, _grads: Any) -> None:
        self._lookup = self._bags.bring_again(self._part, self._slots)

    def _end(self, _grads: Any, _outputs: Any) -> None:
        assert self._lookup is not None  # it has begun
        self._bags.end_update(self._lookup)


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
        self._memory = slot_memory(tbe.physical_tensors())
        self._scratchpad = Scratchpad(self._memory, store, name)
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

    def look_ahead(self, ids: Tensor, offsets: Tensor, lengths: Tensor | None = None) -> None:
        """Begin to bring the rows of a coming batch in.

        Args:
            ids: int ``[N]``, feature-major, relative to the first row of each table; the same
                memory will be looked up. If it is changed until then, all of this was in vain.
            offsets: int ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f; the same
                memory again,
            lengths: or int ``[F * B]`` that the offsets are made of, and this will be given again.
        """
        self._release()
        bags = offsets if lengths is None else lengths
        if any(ahead.is_of(ids, bags) for ahead in self._ahead):
            return
        lookup, out_of_range = self._plan(ids, offsets, train=self.training, ahead=True)
        given = _Unchanged(ids), _Unchanged(bags)
        self._ahead.append(_Ahead(given, out_of_range, lookup))

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Look up and pool; waits for rows that have not been looked ahead for.

        Args:
            ids: int ``[N]``, feature-major, relative to the first row of each table.
            offsets: int ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            weights: float32 ``[N]``, factor of each id's row in its bag's sum.
            lengths: as :meth:`look_ahead` was given.

        Returns:
            ``[B, F * D]``.

        Raises:
            ScratchpadFullError: if the batch has more rows of one table than slots can be had for.
        """
        self._release()
        lookup, out_of_range = self._take(ids, offsets if lengths is None else lengths) or (
            self._plan(ids, offsets, train=torch.is_grad_enabled(), ahead=False)
        )
        try:
            pooled = self._pool(self._scratchpad.wait(lookup), lookup, weights)
        except ScratchpadFullError as error:
            if self._release_garbage():
                return self(ids, offsets, weights, lengths)
            self.out_of_range += out_of_range
            return self._table_by_table(lookup.bags, weights, error)
        except BaseException:
            self._scratchpad.release(lookup)
            raise
        self.out_of_range += out_of_range
        if pooled.grad_fn is not None:
            update = _Update(self, lookup)
            self._to_update[lookup] = weakref.ref(update)
            update.hook(pooled.grad_fn)
        else:
            self._scratchpad.release(lookup)
        return pooled.view(-1, len(self._ranges) * pooled.shape[1])

    def _pool(self, placed: PlacedBags, lookup: PlannedLookup, weights: Tensor | None) -> Tensor:
        assert lookup.bags is not None  # there are slots
        try:
            if weights is not None:
                weights = weights[self._memory.bring(lookup.bags.source)]
            return self.tbe.pool(*placed, weights)
        finally:
            self._scratchpad.mark_used(lookup)

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

    def end_update(self, lookup: PlannedLookup) -> None:
        """Note that the TBE has asked for the update of the rows of a batch.

        Args:
            lookup: of the batch.
        """
        self._scratchpad.mark_used(lookup)

    def _table_by_table(
        self, bags: PooledKeys | None, weights: Tensor | None, error: ScratchpadFullError
    ) -> Tensor:
        """Look up a batch with more rows than there are slots: some tables at a time.

        Rows are brought in for the lookup, and once more for the update. The result is that of the
        whole batch to the last bit, since no row is in two parts.
        """
        assert bags is not None  # its rows are known to be too many
        if self.tbe.counts_lookups:
            raise error  # each part would count as a step
        num_samples = (len(bags.offsets) - 1) // len(self._ranges)
        columns = []
        for part in split_by_table(bags, self._features, self._scratchpad.num_slots, error):
            lookup = self._scratchpad.plan(lambda part=part: part, train=False, ahead=False)
            try:
                placed = self._scratchpad.wait(lookup)
                slots = placed.slots.clone()
                pooled = self._pool(placed._replace(slots=slots), lookup, weights)
            finally:
                self._scratchpad.release(lookup)
            if pooled.grad_fn is not None:
                _PartUpdate(self, part, slots).hook(pooled.grad_fn)
            columns.append(pooled.view(num_samples, -1))
        return torch.cat(columns, 1)

    def bring_again(self, part: PooledKeys, slots: Tensor) -> PlannedLookup:
        """Bring the rows of a part in for its update. They may lie in other slots this time.

        Args:
            part: of a batch that was looked up in parts.
            slots: int64 ``[N]``, of each occurrence; mutated.

        Returns:
            What :meth:`end_update` is given then.
        """
        self._release()  # the part that was updated before this one
        lookup = self._scratchpad.plan(lambda: part, train=True, ahead=False)
        # Autograd has saved the slots for the TBE's backward, and would notice `slots.copy_`.
        slots.data.copy_(self._scratchpad.wait(lookup).slots)
        self._scratchpad.begin_update(lookup)
        self._updated.append(lookup)
        return lookup

    def flush(self) -> None:
        """Write all rows back, before the store is read or changed from outside."""
        self._release()
        self._scratchpad.flush()

    def _plan(
        self, ids: Tensor, offsets: Tensor, *, train: bool, ahead: bool
    ) -> tuple[PlannedLookup, Tensor]:
        """The plan of a batch, and what will hold its ids out of range."""
        ranges = self._ranges  # the thread that makes the bags must not keep the tables alive
        out_of_range = torch.zeros(len(ranges), dtype=torch.int64)
        fetched = self._memory.fetch([ids, offsets])

        def make_bags() -> PooledKeys:
            long = [tensor.long().contiguous() for tensor in fetched()]
            return pool_keys(long[0], long[1], ranges, out_of_range)

        lookup = self._scratchpad.plan(make_bags, train=train, ahead=ahead)
        return lookup, out_of_range

    def _take(self, ids: Tensor, bags: Tensor) -> tuple[PlannedLookup, Tensor] | None:
        """The plan of a batch that was looked ahead for; those before it have been left out."""
        if not any(ahead.is_of(ids, bags) for ahead in self._ahead):
            return None
        while not self._ahead[0].is_of(ids, bags):
            self._scratchpad.release(self._ahead.popleft().lookup)
        ahead = self._ahead.popleft()
        return ahead.lookup, ahead.out_of_range

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
