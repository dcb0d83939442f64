"""The slots of a scratchpad: which row lies where, and which slots may be given away.

Shape legend: N occurrences, U distinct rows of a batch, S slots, C entries of the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error
from torchrec_cafe.ops.huge_pages import advise_huge_pages

#: Words of an entry of the map, of a use in its queue, of a slot; counters.
ENTRY_WORDS, USE_WORDS, SLOT_WORDS, NUM_COUNTERS = 3, 2, 2, 4
#: Of the state of a slot: it differs from the table; a planned batch uses it (and multiples).
DIRTY, HOLD = 1, 4
#: Entries of the map for each row that it has to know.
ENTRIES_PER_ROW = 2


@dataclass
class SlotMapState:
    """State of a slot map, on the CPU.

    Dtypes, shapes and counters are checked; what else is in it is the operators' own, and trusted.

    Attributes:
        entries: int64 ``[C, 3]``, open addressing; see ``csrc/slot_map.h``.
        queue: int64 ``[C, 2]``, ring of the uses of rows in the order of the batches.
        counters: int64 ``[4]``: used entries, free slots, head and tail of the queue.
        slots: int64 ``[S, 2]``: row (-1: none) and state of each slot.
        free: int32 ``[S]``, a stack of the free slots.
    """

    entries: Tensor
    queue: Tensor
    counters: Tensor
    slots: Tensor
    free: Tensor

    @classmethod
    def empty(cls, num_slots: int) -> SlotMapState:
        """The state of a scratchpad without rows.

        Args:
            num_slots: >= 1.
        """
        entries, queue, counters = _empty_map(max(64, ENTRIES_PER_ROW * num_slots))
        counters[1] = num_slots
        slots = advise_huge_pages(torch.empty(num_slots, SLOT_WORDS, dtype=torch.int64))
        slots[:] = torch.tensor([-1, 0])  # no row
        free = torch.arange(num_slots - 1, -1, -1, dtype=torch.int32)
        return cls(entries, queue, counters, slots, free)

    def make_room(self, rows: int) -> None:
        """Enlarge the map, so that so many rows more can be announced.

        Args:
            rows: >= 0.

        Raises:
            ValueError: if the state is no slot map's.
        """
        used = int(self.counters[0])
        if not 0 <= used < max(1, len(self.entries)):
            raise ValueError(
                f"SlotMapState: `counters` must begin with the used entries, fewer than "
                f"{len(self.entries)}, got {used}; make the state with SlotMapState.empty"
            )
        needed = used + rows
        if needed <= len(self.entries) // 4 * 3:
            return
        new = _empty_map(ENTRIES_PER_ROW * max(needed, len(self.entries)))
        new[2][1] = self.counters[1]
        torch.ops.torchrec_cafe.grow_slot_map.default(self.entries, self.queue, self.counters, *new)
        self.entries, self.queue, self.counters = new

    def explain(self, op: str) -> None:
        """Raise a ``TypeError`` or ``ValueError`` for a dtype or shape that is not as above.

        Args:
            op: operator that has refused the state, for the message.
        """
        capacity = self.entries.shape[0] if self.entries.dim() else 0
        slots = self.slots.shape[0] if self.slots.dim() else 0
        check_tensor(op, "state.entries", self.entries, torch.int64, (None, ENTRY_WORDS))
        check_tensor(op, "state.queue", self.queue, torch.int64, (capacity, USE_WORDS))
        check_tensor(op, "state.counters", self.counters, torch.int64, (NUM_COUNTERS,))
        check_tensor(op, "state.slots", self.slots, torch.int64, (None, SLOT_WORDS))
        check_tensor(op, "state.free", self.free, torch.int32, (slots,))
        check_same_device(op, entries=self.entries, counters=self.counters, slots=self.slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        tensors = (self.entries, self.queue, self.counters, self.slots, self.free)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _empty_map(capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    entries = advise_huge_pages(torch.empty(capacity, ENTRY_WORDS, dtype=torch.int64))
    entries[:] = torch.tensor(
        [
            -1,  # no row
            0xFFFFFFFF,  # no slot, position 0
            0xFFFFFFFF,  # never used
        ]
    )
    queue = torch.empty(capacity, USE_WORDS, dtype=torch.int64)
    return entries, queue, torch.zeros(NUM_COUNTERS, dtype=torch.int64)


class Announced(NamedTuple):
    """The rows of a batch.

    Attributes:
        rows: int64 ``[U]``, each once.
        positions: int32 ``[N]``, of each occurrence in ``rows``.
    """

    rows: Tensor
    positions: Tensor


class SlotPlan(NamedTuple):
    """Where the rows of a batch lie, and what has to be moved before.

    Attributes:
        found: int32 ``[U]``, slot of each row.
        fill_rows: int64 ``[F]``, rows that have to be brought in.
        fill_slots: int64 ``[F]``, where to.
        spill_rows: int64 ``[E]``, rows that have changed and lose their slot: they have to be
            written back before the slot is filled.
        spill_slots: int64 ``[E]``, where they lie.
        shortage: slots that are missing; if any, nothing else of this holds.
    """

    found: Tensor
    fill_rows: Tensor
    fill_slots: Tensor
    spill_rows: Tensor
    spill_slots: Tensor
    shortage: int


def announce_rows(keys: Tensor, state: SlotMapState, number: int) -> Announced:
    """Note the rows that a batch is going to use.

    Args:
        keys: int64 ``[N]``, row of each occurrence, >= 0.
        state: mutated; it grows if it has to.
        number: of the batch, in [0, 2**31 - 1), above those of all batches announced before.

    Returns:
        The distinct rows, in the order of their first occurrences.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above or a key is negative; nothing is mutated then.

    Note:
        Deterministic. On the CPU. Not differentiable.
    """
    try:
        state.make_room(keys.numel())
        return Announced._make(
            torch.ops.torchrec_cafe.announce_rows.default(
                keys, state.entries, state.queue, state.counters, number
            )
        )
    except (RuntimeError, IndexError) as error:
        check_tensor("announce_rows", "keys", keys, torch.int64, (None,))
        state.explain("announce_rows")
        raise value_error("announce_rows", error) from None


def plan_slots(
    rows: Tensor, state: SlotMapState, *, oldest: int, urgent: bool, train: bool
) -> SlotPlan:
    """Give each row of an announced batch a slot, and hold the slots until they are released.

    Rows that no batch needs leave first, the least recently used before the others. Rows that an
    announced batch needs stay, unless ``urgent``: then those leave that are needed the latest.

    Args:
        rows: int64 ``[U]``, as :func:`announce_rows` gave them.
        state: mutated.
        oldest: number of the oldest batch that is not released, or less.
        urgent: whether the batch cannot wait for others to be released.
        train: whether the batch changes its rows.

    Returns:
        The slots. If too few are free, ``shortage`` says so, and nothing has changed.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or a row is not announced; nothing is mutated
            then.

    Note:
        Deterministic. On the CPU. Not differentiable.

    Reference: ScratchPipe (ISCA 2022), section 4: its hit map, hold mask and victims, with the
        window as long as the batches that are known.
    """
    try:
        return SlotPlan._make(
            torch.ops.torchrec_cafe.plan_slots.default(
                rows,
                state.entries,
                state.queue,
                state.counters,
                state.slots,
                state.free,
                oldest,
                urgent,
                train,
            )
        )
    except RuntimeError as error:
        check_tensor("plan_slots", "rows", rows, torch.int64, (None,))
        state.explain("plan_slots")
        raise value_error("plan_slots", error) from None


def slots_of_occurrences(found: Tensor, positions: Tensor) -> Tensor:
    """The slot of each occurrence of a batch.

    Args:
        found: int32 ``[U]``, :attr:`SlotPlan.found`.
        positions: int32 ``[N]``, :attr:`Announced.positions`.

    Returns:
        int64 ``[N]``.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or a position is out of range.

    Note:
        Deterministic. On the CPU, on the calling thread. Not differentiable.
    """
    try:
        return torch.ops.torchrec_cafe.slots_of_occurrences.default(found, positions)
    except RuntimeError as error:
        check_tensor("slots_of_occurrences", "found", found, torch.int32, (None,))
        check_tensor("slots_of_occurrences", "positions", positions, torch.int32, (None,))
        raise value_error("slots_of_occurrences", error) from None


def retract_rows(rows: Tensor, state: SlotMapState) -> None:
    """Forget an announced batch that will not be planned.

    Args:
        rows: int64 ``[U]``, as :func:`announce_rows` gave them.
        state: mutated.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a row is not announced; nothing is mutated then.

    Note:
        Deterministic. On the CPU. Not differentiable.
    """
    try:
        torch.ops.torchrec_cafe.retract_rows.default(
            rows, state.entries, state.queue, state.counters
        )
    except RuntimeError as error:
        check_tensor("retract_rows", "rows", rows, torch.int64, (None,))
        state.explain("retract_rows")
        raise value_error("retract_rows", error) from None


def release_slots(held: Tensor, state: SlotMapState) -> None:
    """Let go of the slots of a batch.

    Args:
        held: int32 ``[U]``, :attr:`SlotPlan.found`.
        state: mutated.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a slot is not held; nothing is mutated then.

    Note:
        Deterministic. On the CPU. Not differentiable.
    """
    try:
        torch.ops.torchrec_cafe.release_slots.default(held, state.slots)
    except RuntimeError as error:
        check_tensor("release_slots", "held", held, torch.int32, (None,))
        state.explain("release_slots")
        raise value_error("release_slots", error) from None


def postpone_rows(rows: Tensor, held: Tensor, state: SlotMapState) -> None:
    """Take back the plan of a batch that has not begun, so that another can have its slots.

    Args:
        rows: int64 ``[U]``, as :func:`announce_rows` gave them.
        held: int32 ``[U]``, :attr:`SlotPlan.found`.
        state: mutated: the batch is announced, and has to be planned again.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a slot is not held or has another row; nothing is mutated then.

    Note:
        Deterministic. On the CPU. Not differentiable.
    """
    try:
        torch.ops.torchrec_cafe.postpone_rows.default(
            rows, held, state.entries, state.queue, state.counters, state.slots, state.free
        )
    except RuntimeError as error:
        check_tensor("postpone_rows", "rows", rows, torch.int64, (None,))
        check_tensor("postpone_rows", "held", held, torch.int32, tuple(rows.shape))
        state.explain("postpone_rows")
        raise value_error("postpone_rows", error) from None


@torch.library.register_fake("torchrec_cafe::announce_rows")
def _(
    keys: Tensor, entries: Tensor, queue: Tensor, counters: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    check_same_device("announce_rows", keys=keys, state=entries)
    size = torch.library.get_ctx().new_dynamic_size()
    return keys.new_empty(size), keys.new_empty(keys.shape, dtype=torch.int32)


@torch.library.register_fake("torchrec_cafe::plan_slots")
def _(  # noqa: PLR0913  the schema has as many arguments
    rows: Tensor,
    entries: Tensor,
    queue: Tensor,
    counters: Tensor,
    slots: Tensor,
    free: Tensor,
    oldest: int,
    urgent: bool,  # noqa: FBT001
    train: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    check_same_device("plan_slots", rows=rows, state=entries)
    context = torch.library.get_ctx()
    fills, spills = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        rows.new_empty(rows.shape, dtype=torch.int32),
        rows.new_empty(fills),
        rows.new_empty(fills),
        rows.new_empty(spills),
        rows.new_empty(spills),
        0,
    )


@torch.library.register_fake("torchrec_cafe::slots_of_occurrences")
def _(found: Tensor, positions: Tensor) -> Tensor:
    check_same_device("slots_of_occurrences", found=found, positions=positions)
    return positions.new_empty(positions.shape, dtype=torch.int64)


@torch.library.register_fake("torchrec_cafe::retract_rows")
def _(rows: Tensor, entries: Tensor, queue: Tensor, counters: Tensor) -> None:
    check_same_device("retract_rows", rows=rows, state=entries)


@torch.library.register_fake("torchrec_cafe::release_slots")
def _(held: Tensor, slots: Tensor) -> None:
    check_same_device("release_slots", held=held, state=slots)


@torch.library.register_fake("torchrec_cafe::postpone_rows")
def _(  # noqa: PLR0913  the schema has as many arguments
    rows: Tensor,
    held: Tensor,
    entries: Tensor,
    queue: Tensor,
    counters: Tensor,
    slots: Tensor,
    free: Tensor,
) -> None:
    check_same_device("postpone_rows", rows=rows, held=held, state=entries)


@torch.library.register_fake("torchrec_cafe::grow_slot_map")
def _(  # noqa: PLR0913  the schema has as many arguments
    entries: Tensor,
    queue: Tensor,
    counters: Tensor,
    new_entries: Tensor,
    new_queue: Tensor,
    new_counters: Tensor,
) -> None:
    check_same_device("grow_slot_map", state=entries, new_state=new_entries)
