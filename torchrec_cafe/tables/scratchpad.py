"""A scratchpad: slots that hold the rows which the coming batches need, filled ahead of time.

A thread of its own notes the rows of each batch, gives them slots and moves rows, while the batches
before train. It alone touches the slot map, so that nothing has to be locked; rows that a planned
batch uses never leave their slots, so that it never touches memory that the training touches.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from torchrec_cafe.ops import (
    SlotMapState,
    announce_rows,
    plan_slots,
    postpone_rows,
    release_slots,
    retract_rows,
)
from torchrec_cafe.ops.slot_map import DIRTY, HOLD
from torchrec_cafe.tables.row_store import RowStore


class ScratchpadFullError(RuntimeError):
    """A batch needs more rows at once than the scratchpad has slots."""


@dataclass
class LookaheadStatistics:
    """What a scratchpad has done so far.

    Attributes:
        batches: batches that were looked up.
        rows: distinct rows of these batches.
        hits: rows that lay in a slot when their batch was planned.
        fills: rows that were brought in.
        critical_misses: rows that were asked for by their own lookup only: nobody had looked ahead,
            or too few slots were free to do it.
        bytes_in: bytes that were brought in, with optimizer state.
        bytes_out: bytes that were written back.
        seconds_moving: time spent planning and moving rows.
        seconds_exposed: time that lookups waited for it.
    """

    batches: int = 0
    rows: int = 0
    hits: int = 0
    fills: int = 0
    critical_misses: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds_moving: float = 0.0
    seconds_exposed: float = 0.0

    @property
    def seconds_hidden(self) -> float:
        """Time spent planning and moving rows that no lookup waited for."""
        return max(0.0, self.seconds_moving - self.seconds_exposed)


@dataclass(eq=False)
class PlannedLookup:
    """The rows of a batch, and where they lie once it is ready.

    Attributes:
        keys: int64 ``[N]``, row of each occurrence.
        train: whether rows may change.
        number: of the batch.
        ahead: whether it is looked up later, and can be planned until then.
        slots: int64 ``[N]``, slot of each occurrence, when it is ready.
    """

    keys: Tensor
    train: bool
    number: int
    ahead: bool
    slots: Tensor | None = None
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    held: Tensor | None = None
    refused: ScratchpadFullError | None = None
    begun: bool = False
    released: bool = False


@final
class Scratchpad:
    """Keeps rows of a store in slots while they are needed.

    All methods are called by one thread, that of the training.

    Args:
        slots: tensors ``[S, ...]`` that hold rows and optimizer states, weights first.
        store: holds the rest.
        name: of the tables, for messages.
    """

    def __init__(self, slots: Sequence[Tensor], store: RowStore, name: str) -> None:
        """Start with empty slots; see the class."""
        self._mover = _Mover(slots, store, name)
        self._stale = False
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

    def plan(self, keys: Tensor, *, train: bool, ahead: bool) -> PlannedLookup:
        """Begin to bring the rows of a batch into slots.

        Args:
            keys: int64 ``[N]``, rows of the store, in range.
            train: whether the batch may change its rows.
            ahead: whether other batches are looked up before it.
        """
        self.refresh()
        lookup = PlannedLookup(keys, train, self._next, ahead)
        self._next += 1
        self._mover.submit(lookup)
        return lookup

    def wait(self, lookup: PlannedLookup) -> Tensor:
        """Wait until the rows of a batch are in their slots.

        Args:
            lookup: of :meth:`plan`; mutated.

        Returns:
            int64 ``[N]``, slot of each occurrence. They are the batch's until it is released.

        Raises:
            ScratchpadFullError: if the batch has more rows than slots can be had for.
            OSError: if the store cannot be read or written.
        """
        self.refresh()
        return self._mover.wait(lookup)

    def begin_update(self, lookup: PlannedLookup) -> None:
        """Note that the rows of a batch are about to change.

        Args:
            lookup: of a batch that was waited for; mutated.
        """
        self.refresh()
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

        Rows are read anew before they are used again, in case the store is changed from outside.
        Batches whose update is done must have been released.
        """
        if not self._clean:
            self._mover.ask(self._mover.write_back)
            self._clean = True
        self._stale = True

    def refresh(self) -> None:
        """Read the rows in slots anew, if the store may have been changed from outside."""
        if self._stale:
            self._stale = False
            self._mover.ask(self._mover.read_anew)


class _Mover:
    """The thread that plans and moves, and what it shares with the training's thread.

    Attributes:
        state: the slot map; the mover's own.
        statistics: what it has done.
    """

    def __init__(self, slots: Sequence[Tensor], store: RowStore, name: str) -> None:
        self.state = SlotMapState.empty(len(slots[0]))
        self.statistics = LookaheadStatistics()
        self._slots = slots
        self._store = store
        self._name = name
        self._changed = threading.Condition()
        # All below is shared, under the condition.
        self._new: list[PlannedLookup] = []  # to be announced
        self._waiting: list[PlannedLookup] = []  # announced, to be planned
        self._planned: list[PlannedLookup] = []  # planned, not released
        self._released: list[Tensor] = []  # slots to let go of
        self._asked: list[Callable[[], None]] = []
        self._urgent: PlannedLookup | None = None
        self._may_plan = True  # something has changed since planning has failed
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    # --- called by the training's thread ---------------------------------------------------------

    def submit(self, lookup: PlannedLookup) -> None:
        """Have a batch announced and, when there is room, planned."""
        with self._changed:
            self._raise()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"look-ahead of {self._name}", daemon=True
                )
                self._thread.start()
            self._new.append(lookup)
            self._changed.notify_all()

    def wait(self, lookup: PlannedLookup) -> Tensor:
        """Wait until a batch is planned and its rows are in their slots."""
        begin = time.perf_counter()
        with self._changed:
            if lookup.slots is None:
                self._urgent = lookup
                self._changed.notify_all()
                while lookup.slots is None and lookup.refused is None and self._error is None:
                    self._changed.wait()
                self._urgent = None
                self.statistics.seconds_exposed += time.perf_counter() - begin
            self._raise()
            if lookup.refused is not None:
                raise lookup.refused
            lookup.begun = True
            self.statistics.batches += 1
            self.statistics.rows += len(lookup.rows)
        assert lookup.slots is not None
        return lookup.slots

    def release(self, lookup: PlannedLookup) -> None:
        """Have the slots of a batch released, at once or as soon as it has some."""
        with self._changed:
            if lookup in self._planned:
                self._let_go(lookup)
                self._changed.notify_all()

    def _let_go(self, lookup: PlannedLookup) -> None:
        assert lookup.held is not None
        self._planned.remove(lookup)
        self._released.append(lookup.held)
        self._may_plan = True

    def ask(self, task: Callable[[], None]) -> None:
        """Have something done between two moves, and wait for it."""
        if self._thread is None:
            return  # there are no rows yet
        with self._changed:
            self._raise()
            self._asked.append(task)
            self._changed.notify_all()
            while task in self._asked and self._error is None:
                self._changed.wait()
            self._raise()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                step = self._step()
                while step is None and not self._closed:
                    self._changed.wait()
                    step = self._step()
                if step is None or self._closed:
                    return
            try:
                begin = time.perf_counter()
                step()
                self.statistics.seconds_moving += time.perf_counter() - begin
            except BaseException as error:  # noqa: BLE001  the training's thread raises it
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def _step(self) -> Callable[[], None] | None:
        """What to do next, if anything."""
        if self._asked:
            return self._answer
        if self._new:
            return self._announce
        if self._urgent is not None and self._urgent in self._waiting:
            return self._plan_urgent
        if self._waiting and self._may_plan:
            return self._plan_next
        return None

    def _answer(self) -> None:
        self._asked[0]()
        with self._changed:
            self._asked.pop(0)
            self._changed.notify_all()

    def _announce(self) -> None:
        lookup = self._new[0]
        announced = announce_rows(lookup.keys, self.state, lookup.number)
        lookup.rows, lookup.positions = announced
        with self._changed:
            self._new.pop(0)
            self._waiting.append(lookup)
            self._may_plan = True

    def _plan_next(self) -> None:
        with self._changed:
            lookup = self._waiting[0]
            self._may_plan = False
        self._plan(lookup, urgent=False)

    def _plan_urgent(self) -> None:
        with self._changed:
            lookup = self._urgent
        if lookup is None:
            return
        missing = self._plan(lookup, urgent=False)
        if missing > 0:
            lookup.ahead = False
            missing = self._plan(lookup, urgent=True)
        while missing > 0:
            with self._changed:
                others = [planned for planned in self._planned if not planned.begun]
            if not others:
                return self._refuse(lookup, missing)
            self._postpone(others[-1])
            missing = self._plan(lookup, urgent=True)

    def _refuse(self, lookup: PlannedLookup, missing: int) -> None:
        retract_rows(lookup.rows, self.state)
        with self._changed:
            self._waiting.remove(lookup)
            lookup.refused = self._too_few_slots(lookup, missing)
            self._changed.notify_all()

    def _postpone(self, lookup: PlannedLookup) -> None:
        """Take the slots of a batch that has not begun; it is planned again in its turn."""
        assert lookup.held is not None
        postpone_rows(lookup.rows, lookup.held, self.state)
        with self._changed:
            self._planned.remove(lookup)
            lookup.slots = lookup.held = None
            self._waiting.append(lookup)
            self._waiting.sort(key=lambda waiting: waiting.number)

    def _plan(self, lookup: PlannedLookup, *, urgent: bool) -> int:
        """Plan a batch and move its rows; returns how many slots are missing."""
        with self._changed:
            released, self._released = self._released, []
            live = [other.number for other in (*self._waiting, *self._planned)]
        for held in released:
            release_slots(held, self.state)
        plan = plan_slots(
            lookup.rows, self.state, oldest=min(live), urgent=urgent, train=lookup.train
        )
        if plan.shortage > 0:
            return plan.shortage
        self._store.write(plan.spill_rows, self._slots, plan.spill_slots)
        self._store.read(plan.fill_rows, self._slots, plan.fill_slots)
        slots = plan.found[lookup.positions].long()
        with self._changed:
            self._count(lookup, len(plan.fill_rows), len(plan.spill_rows))
            lookup.held, lookup.slots = plan.found, slots
            self._waiting.remove(lookup)
            self._planned.append(lookup)
            if lookup.released:
                self._let_go(lookup)
            self._changed.notify_all()
        return 0

    def _count(self, lookup: PlannedLookup, fills: int, spills: int) -> None:
        statistics, row_bytes = self.statistics, self._store.row_bytes
        statistics.hits += len(lookup.rows) - fills
        statistics.fills += fills
        statistics.bytes_in += fills * row_bytes
        statistics.bytes_out += spills * row_bytes
        if not lookup.ahead:
            statistics.critical_misses += fills

    def _too_few_slots(self, lookup: PlannedLookup, missing: int) -> ScratchpadFullError:
        num_slots = len(self.state.slots)
        return ScratchpadFullError(
            f"{self._name}: a batch has {len(lookup.rows)} distinct rows, and the scratchpad has "
            f"{num_slots} slots, {missing} too few with what other batches hold that are looked "
            f"up and not yet updated; use Lookahead(cache_fraction=...) for at least "
            f"{num_slots + missing} slots or smaller batches"
        )

    # --- asked for -------------------------------------------------------------------------------

    def write_back(self) -> None:
        """Write all slots that differ from the store."""
        rows, states = self.state.slots.unbind(1)
        dirty = ((rows >= 0) & (states & DIRTY > 0)).nonzero().squeeze(1)
        self._store.write(rows[dirty], self._slots, dirty)
        self.statistics.bytes_out += len(dirty) * self._store.row_bytes
        # Slots of planned batches have yet to change.
        states[dirty[states[dirty] < HOLD]] &= ~DIRTY

    def mark_changed(self, lookup: PlannedLookup) -> None:
        """Note that the slots of a planned batch differ from the store."""
        assert lookup.held is not None
        self.state.slots[lookup.held.long(), 1] |= DIRTY

    def read_anew(self) -> None:
        """Read all rows that lie in slots."""
        rows = self.state.slots[:, 0]
        held = (rows >= 0).nonzero().squeeze(1)
        self._store.read(rows[held], self._slots, held)
        self.statistics.bytes_in += len(held) * self._store.row_bytes
