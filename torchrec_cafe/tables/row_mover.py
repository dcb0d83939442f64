"""The thread of a scratchpad: it notes the rows of each batch, gives them slots and moves rows.

It alone touches the slot map, so that nothing of it has to be locked; rows that a planned batch
uses never leave their slots, so that it never touches memory that the training touches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

from torchrec_cafe.ops import (
    SlotMapState,
    announce_rows,
    plan_slots,
    postpone_rows,
    release_slots,
    retract_rows,
    slots_of_occurrences,
)
from torchrec_cafe.ops.slot_map import DIRTY, HOLD
from torchrec_cafe.tables.planned_lookup import (
    LookaheadStatistics,
    PlannedLookup,
    ScratchpadFullError,
)
from torchrec_cafe.tables.row_store import RowStore
from torchrec_cafe.tables.slot_memory import PlacedBags, SlotMemory


@final
class RowMover:
    """The thread that plans and moves, and what it shares with the training's thread.

    Attributes:
        state: the slot map; the mover's own.
        statistics: what it has done.
    """

    def __init__(self, memory: SlotMemory, store: RowStore, name: str) -> None:
        self.state = SlotMapState.empty(memory.num_slots)
        self.statistics = LookaheadStatistics()
        self._memory = memory
        self._store = store
        self._name = name
        self._changed = threading.Condition()
        # All below is shared, under the condition.
        self._new: list[PlannedLookup] = []  # to be announced
        self._waiting: list[PlannedLookup] = []  # announced, to be planned
        self._planned: list[PlannedLookup] = []  # planned, not released
        self._released: list[PlannedLookup] = []  # whose slots are to be let go of
        self._asked: list[Callable[[], None]] = []
        self._urgent: PlannedLookup | None = None
        self._may_plan = True  # something has changed since planning has failed
        self._error: BaseException | None = None
        self._closed = False
        self._paused = False  # the mover's own
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

    def wait(self, lookup: PlannedLookup) -> PlacedBags:
        """Wait until a batch is planned and its rows are on their way to their slots."""
        begin = time.perf_counter()
        with self._changed:
            if lookup.placed is None:
                self._urgent = lookup
                self._changed.notify_all()
                try:
                    while not (lookup.placed or lookup.refused or self._has_ended()):
                        self._changed.wait()
                finally:
                    self._urgent = None
                self.statistics.seconds_exposed += time.perf_counter() - begin
            self._raise()
            if lookup.refused is not None:
                raise lookup.refused
            lookup.begun = True
            self.statistics.batches += 1
            self.statistics.rows += len(lookup.rows)
            self.statistics.hits += len(lookup.rows) - lookup.fills
            if not lookup.ahead:
                self.statistics.critical_misses += lookup.fills
        assert lookup.placed is not None
        return lookup.placed

    def release(self, lookup: PlannedLookup) -> None:
        """Have the slots of a batch released, at once or as soon as it has some."""
        with self._changed:
            if lookup in self._planned:
                self._let_go(lookup)
                self._changed.notify_all()

    def _let_go(self, lookup: PlannedLookup) -> None:
        self._planned.remove(lookup)
        self._released.append(lookup)
        self._may_plan = True

    def ask(self, task: Callable[[], None]) -> None:
        """Have something done between two moves, and wait for it."""
        if self._thread is None:
            return task()
        with self._changed:
            self._raise()
            self._asked.append(task)
            self._changed.notify_all()
            while task in self._asked and not self._has_ended():
                self._changed.wait()
            self._raise()

    def close(self) -> None:
        """End the thread, and wait for the move that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _has_ended(self) -> bool:
        return self._closed or self._error is not None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError(f"{self._name}: rows cannot be moved any more: the process ends")

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
        if self._paused:
            return None
        if any(lookup.released for lookup in self._waiting):
            return self._forget_released
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
        try:
            lookup.bags = lookup.make_bags()
        except (TypeError, ValueError) as error:
            self._drop(lookup, self._new, error)
            return
        announced = announce_rows(lookup.bags.keys, self.state, lookup.number)
        lookup.rows, lookup.positions = announced
        with self._changed:
            self._new.pop(0)
            self._waiting.append(lookup)
            self._may_plan = True

    def _forget_released(self) -> None:
        """Forget batches that were given up before they were planned."""
        with self._changed:
            given_up = [lookup for lookup in self._waiting if lookup.released]
            self._waiting = [lookup for lookup in self._waiting if not lookup.released]
            self._may_plan = True
        for lookup in given_up:
            retract_rows(lookup.rows, self.state)

    def _drop(self, lookup: PlannedLookup, of: list[PlannedLookup], error: Exception) -> None:
        """Refuse a lookup; others go on."""
        with self._changed:
            of.remove(lookup)
            lookup.refused = error
            self._changed.notify_all()

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
        self._drop(lookup, self._waiting, self._too_few_slots(lookup, missing))

    def _postpone(self, lookup: PlannedLookup) -> None:
        """Take the slots of a batch that has not begun; it is planned again in its turn."""
        assert lookup.held is not None
        postpone_rows(lookup.rows, lookup.held, self.state)
        with self._changed:
            self._planned.remove(lookup)
            lookup.placed = lookup.held = None
            self._may_plan = True
            self._waiting.append(lookup)
            self._waiting.sort(key=lambda waiting: waiting.number)

    def _plan(self, lookup: PlannedLookup, *, urgent: bool) -> int:
        """Plan a batch and move its rows; returns how many slots are missing."""
        with self._changed:
            released, self._released = self._released, []
            live = [other.number for other in (*self._waiting, *self._planned)]
        for other in released:
            assert other.held is not None
            self._memory.wait_for(other.done)
            release_slots(other.held, self.state)
        plan = plan_slots(
            lookup.rows, self.state, oldest=min(live), urgent=urgent, train=lookup.train
        )
        if plan.shortage > 0:
            return plan.shortage
        out, into = (plan.spill_rows, plan.spill_slots), (plan.fill_rows, plan.fill_slots)
        self._memory.exchange(self._store, out, into)
        assert lookup.bags is not None
        slots = slots_of_occurrences(plan.found, lookup.positions)
        placed = self._memory.place(slots, lookup.bags.offsets)
        ready = self._memory.moved()
        with self._changed:
            self._count(lookup, len(plan.fill_rows), len(plan.spill_rows))
            lookup.held, lookup.placed, lookup.ready = plan.found, placed, ready
            self._waiting.remove(lookup)
            self._planned.append(lookup)
            self._may_plan = True  # the next one has not been tried
            if lookup.released:
                self._let_go(lookup)
            self._changed.notify_all()
        return 0

    def _count(self, lookup: PlannedLookup, fills: int, spills: int) -> None:
        statistics, row_bytes = self.statistics, self._store.row_bytes
        lookup.fills = fills
        statistics.fills += fills
        statistics.bytes_in += fills * row_bytes
        statistics.bytes_out += spills * row_bytes

    def _too_few_slots(self, lookup: PlannedLookup, missing: int) -> ScratchpadFullError:
        num_slots = len(self.state.slots)
        return ScratchpadFullError(
            f"{self._name}: a batch has {len(lookup.rows)} distinct rows, and the scratchpad has "
            f"{num_slots} slots, {missing} too few with what other batches hold that are looked "
            f"up and not yet updated; use Lookahead(cache_fraction=...) for at least "
            f"{num_slots + missing} slots or smaller batches"
        )

    # --- asked for -------------------------------------------------------------------------------

    def hold_still(self, *, write_back: bool) -> None:
        """Move nothing until rows are read anew: the store is in other hands.

        Args:
            write_back: whether to write all slots that differ from the store before.
        """
        self._memory.settle()  # updates are in the slots
        if write_back:
            self._write_back()
        self._paused = True

    def _write_back(self) -> None:
        rows, states = self.state.slots.unbind(1)
        dirty = ((rows >= 0) & (states & DIRTY > 0)).nonzero().squeeze(1)
        self._memory.spill(self._store, rows[dirty], dirty)
        self.statistics.bytes_out += len(dirty) * self._store.row_bytes
        # Slots of planned batches have yet to change.
        states[dirty[states[dirty] < HOLD]] &= ~DIRTY

    def mark_changed(self, lookup: PlannedLookup) -> None:
        """Note that the slots of a planned batch differ from the store."""
        assert lookup.held is not None
        self.state.slots[lookup.held.long(), 1] |= DIRTY

    def read_anew(self) -> None:
        """Read all rows that lie in slots, and go on."""
        self._memory.settle()  # what others have asked a device to do with the store is done
        rows = self.state.slots[:, 0]
        held = (rows >= 0).nonzero().squeeze(1)
        self._memory.fill(self._store, rows[held], held)
        self.statistics.bytes_in += len(held) * self._store.row_bytes
        ready = self._memory.moved()
        with self._changed:
            for lookup in self._planned:
                lookup.ready = ready
        self._paused = False
