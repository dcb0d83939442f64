"""A scratchpad: slots that hold the rows which the coming batches need, filled ahead of time."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import final

from torchrec_cafe.ops import PooledKeys
from torchrec_cafe.tables.planned_lookup import LookaheadStatistics, PlannedLookup
from torchrec_cafe.tables.row_mover import RowMover
from torchrec_cafe.tables.row_store import RowStore
from torchrec_cafe.tables.slot_memory import PlacedBags, SlotMemory


@final
class Scratchpad:
    """Keeps rows of a store in slots while they are needed.

    All methods are called by the training, one at a time: by its thread, or by autograd's while
    that one waits for a backward pass.

    Args:
        memory: the slots.
        store: holds the rest.
        name: of the tables, for messages.
    """

    def __init__(self, memory: SlotMemory, store: RowStore, name: str) -> None:
        """Start with empty slots; see the class."""
        self._memory = memory
        self._mover = RowMover(memory, store, name)
        self._stale = True  # a device may still be at setting the rows
        self._clean = True
        self._next = 0
        self._close = weakref.finalize(self, self._mover.close)

    @property
    def statistics(self) -> LookaheadStatistics:
        """What has been done so far; live."""
        return self._mover.statistics

    @property
    def num_slots(self) -> int:
        """Rows that fit."""
        return len(self._mover.state.slots)

    @property
    def map_bytes(self) -> int:
        """Bytes of the slot map."""
        return self._mover.state.num_bytes

    def plan(
        self, make_bags: Callable[[], PooledKeys], *, train: bool, ahead: bool
    ) -> PlannedLookup:
        """Begin to bring the rows of a batch into slots.

        Args:
            make_bags: gives the batch's bags of rows of the store; called by another thread.
            train: whether the batch may change its rows.
            ahead: whether other batches are looked up before it.
        """
        self.refresh()
        lookup = PlannedLookup(make_bags, train, self._next, ahead)
        self._next += 1
        self._mover.submit(lookup)
        return lookup

    def wait(self, lookup: PlannedLookup) -> PlacedBags:
        """Wait until the rows of a batch are in their slots, as far as the caller's work can see.

        Args:
            lookup: of :meth:`plan`; mutated.

        Returns:
            Slots of the batch, its own until it is released.

        Raises:
            ScratchpadFullError: if the batch has more rows than slots can be had for.
            ValueError: what making its bags raised.
            OSError: if the store cannot be read or written.
        """
        self.refresh()
        placed = self._mover.wait(lookup)
        self._memory.meet(lookup.ready, placed)
        return placed

    def mark_used(self, lookup: PlannedLookup) -> None:
        """Note that a lookup or an update of the rows of a batch has been asked for.

        Args:
            lookup: of a batch that was waited for; mutated: its rows stay until this is done.
        """
        lookup.done = self._memory.used()

    def begin_update(self, lookup: PlannedLookup) -> None:
        """Note that the rows of a batch are about to change.

        Args:
            lookup: of a batch that was waited for; mutated.
        """
        self.refresh()
        assert lookup.placed is not None  # it was waited for
        self._memory.meet(lookup.ready, lookup.placed)  # rows may have been read anew since
        self._clean = False
        if not lookup.train:
            lookup.train = True
            self._mover.ask(functools.partial(self._mover.mark_changed, lookup))

    def release(self, lookup: PlannedLookup) -> None:
        """Let go of the slots of a batch whose update is done, or that will not be looked up.

        Args:
            lookup: mutated.
        """
        if not lookup.released:
            lookup.released = True
            self._mover.release(lookup)

    def flush(self) -> None:
        """Write back all that has changed, so that the store holds every row as it is.

        Nothing moves until rows are used again, and they are read anew then, in case the store is
        changed from outside.
        Batches whose update is done must have been released.
        """
        self._stale = True
        hold = functools.partial(self._mover.hold_still, write_back=not self._clean)
        self._mover.ask(hold)
        self._clean = True

    def refresh(self) -> None:
        """Read the rows in slots anew, if the store may have been changed from outside."""
        if self._stale:
            self._mover.ask(self._mover.read_anew)
            self._stale = False
