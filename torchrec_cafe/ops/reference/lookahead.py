"""The slots of a scratchpad, bags of pooled tables, and rows that move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import torch
from torch import Tensor

from torchrec_cafe.ops.pool_keys import PooledKeys
from torchrec_cafe.ops.slot_map import Announced, SlotPlan

#: Batches back that the uses of a row are remembered for.
USE_WINDOW = 16
#: The next use of a row that no announced batch needs.
NEVER = 2**31 - 1


@dataclass
class _Row:
    """A row that lies in a slot, or that an announced batch needs.

    Attributes:
        slot: where it lies, if anywhere.
        uses: numbers of the batches that were announced with it.
        position: among the rows of the last of them.
        pending: how many of them are not planned.
    """

    slot: int | None = None
    uses: list[int] = field(default_factory=list)
    position: int = 0
    pending: int = 0

    @property
    def last(self) -> int:
        return self.uses[-1]

    @property
    def next(self) -> int:
        """The next batch that will be planned with it, if batches are planned in their order.

        A use that was retracted counts as one to come: it cannot be told from the others.
        """
        if self.pending == 0:
            return NEVER
        remembered = [use for use in self.uses if self.last - use < USE_WINDOW]
        if self.pending > len(remembered):
            return self.last - USE_WINDOW
        return remembered[-self.pending]


class SlotMap:
    """What :class:`torchrec_cafe.ops.SlotMapState` and its operators do.

    Args:
        num_slots: of the scratchpad.

    Attributes:
        rows: what is known of each row.
        slots: the row in each slot, if any.
        holds: how many planned batches use each slot.
        dirty: slots that differ from the table.
        free: a stack of the slots without a row.
    """

    def __init__(self, num_slots: int) -> None:
        """Start without rows; see the class."""
        self.rows: dict[int, _Row] = {}
        self.slots: list[int | None] = [None] * num_slots
        self.holds = [0] * num_slots
        self.dirty: set[int] = set()
        self.free = list(reversed(range(num_slots)))

    def announce(self, keys: Tensor, number: int) -> Announced:
        """See :func:`torchrec_cafe.ops.announce_rows`."""
        distinct = list(dict.fromkeys(keys.tolist()))
        for position, key in enumerate(distinct):
            row = self.rows.setdefault(key, _Row())
            row.uses.append(number)
            row.position = position
            row.pending += 1
        positions = [self.rows[key].position for key in keys.tolist()]
        return Announced(_int64(distinct), torch.tensor(positions, dtype=torch.int32))

    def plan(self, rows: Tensor, *, oldest: int, urgent: bool, train: bool) -> SlotPlan:
        """See :func:`torchrec_cafe.ops.plan_slots`."""
        batch = rows.tolist()
        misses = [key for key in batch if self.rows[key].slot is None]
        wanted = max(0, len(misses) - len(self.free))
        leaving = self._unused(oldest)[:wanted]
        if urgent:
            leaving += self._needed_late({*batch, *leaving})[: wanted - len(leaving)]
        if len(leaving) < wanted:
            return self._result(batch, [], [], wanted - len(leaving))
        spills = [(key, slot) for key in leaving if (slot := self._vacate(key)) in self.dirty]
        self.dirty.difference_update(slot for _, slot in spills)
        fills = [(key, self._occupy(key)) for key in misses]
        for key in batch:
            row = self.rows[key]
            assert row.slot is not None
            row.pending -= 1
            self.holds[row.slot] += 1
            if train:
                self.dirty.add(row.slot)
        return self._result(batch, fills, spills, 0)

    def _unused(self, oldest: int) -> list[int]:
        """Rows that all batches are done with, the least recently used first."""
        found = [
            (row.last, row.position, key)
            for key, row in self.rows.items()
            if row.slot is not None and row.last < oldest
        ]
        return [key for *_, key in sorted(found)]

    def _needed_late(self, staying: set[int]) -> list[int]:
        """Other rows that no planned batch uses, those first that are needed the latest."""
        found = [
            (-row.next, row.last, row.slot, key)
            for key, row in self.rows.items()
            if row.slot is not None and self.holds[row.slot] == 0 and key not in staying
        ]
        return [key for *_, key in sorted(found)]

    def _vacate(self, key: int) -> int:
        row = self.rows[key]
        slot, row.slot = row.slot, None
        assert slot is not None
        self.slots[slot] = None
        self.free.append(slot)
        self._forget(key)
        return slot

    def _occupy(self, key: int) -> int:
        slot = self.free.pop()
        self.rows[key].slot = slot
        self.slots[slot] = key
        return slot

    def _forget(self, key: int) -> None:
        if self.rows[key].pending == 0 and self.rows[key].slot is None:
            del self.rows[key]

    def _result(
        self,
        batch: list[int],
        fills: list[tuple[int, int]],
        spills: list[tuple[int, int]],
        shortage: int,
    ) -> SlotPlan:
        slots = [self.rows[key].slot for key in batch]
        found = torch.tensor([-1 if slot is None else slot for slot in slots], dtype=torch.int32)
        return SlotPlan(
            found,
            _int64([row for row, _ in fills]),
            _int64([slot for _, slot in fills]),
            _int64([row for row, _ in spills]),
            _int64([slot for _, slot in spills]),
            shortage,
        )

    def postpone(self, rows: Tensor, held: Tensor) -> None:
        """See :func:`torchrec_cafe.ops.postpone_rows`."""
        for key in rows.tolist():
            self.rows[key].pending += 1
        self.release(held)

    def retract(self, rows: Tensor) -> None:
        """See :func:`torchrec_cafe.ops.retract_rows`."""
        for key in rows.tolist():
            self.rows[key].pending -= 1
            self._forget(key)

    def release(self, held: Tensor) -> None:
        """See :func:`torchrec_cafe.ops.release_slots`."""
        for slot in held.tolist():
            self.holds[slot] -= 1


def pool_keys(ids: Tensor, offsets: Tensor, ranges: Tensor, out_of_range: Tensor) -> PooledKeys:
    """See :func:`torchrec_cafe.ops.pool_keys`."""
    features = len(ranges)
    batch_size = (offsets.numel() - 1) // features
    keys, out_offsets, source = [], [0], []
    for sample in range(batch_size):
        for feature, (first, size) in enumerate(ranges.tolist()):
            bag = feature * batch_size + sample
            for i in range(int(offsets[bag]), int(offsets[bag + 1])):
                in_range = 0 <= int(ids[i]) < size
                out_of_range[feature] += 0 if in_range else 1
                if size > 0:
                    keys.append(first + (int(ids[i]) if in_range else 0))
                    source.append(i)
            out_offsets.append(len(keys))
    return PooledKeys(_int64(keys), _int64(out_offsets), torch.tensor(source, dtype=torch.int32))


def copy_rows(into: Tensor, into_rows: Tensor, source: Tensor, rows: Tensor) -> None:
    """See :func:`torchrec_cafe.ops.copy_rows`."""
    for to, row in zip(into_rows.tolist(), rows.tolist(), strict=True):
        into[to] = source[row]


def read_rows(
    file: int, rows: Tensor, into: Tensor, into_rows: Tensor, *, num_threads: int
) -> None:
    """See :func:`torchrec_cafe.ops.read_rows`; on one thread."""
    del num_threads
    with open(file, "rb", buffering=0, closefd=False) as opened:
        for to, row in zip(into_rows.tolist(), rows.tolist(), strict=True):
            wanted = _seek(opened, row, into[to])
            data = bytearray(opened.read(wanted))
            if len(data) < wanted:
                raise OSError("the file is too short")
            if wanted > 0:
                into[to] = torch.frombuffer(data, dtype=into.dtype).view(into[to].shape)


def write_rows(
    file: int, rows: Tensor, source: Tensor, source_rows: Tensor, *, num_threads: int
) -> None:
    """See :func:`torchrec_cafe.ops.write_rows`; on one thread."""
    del num_threads
    with open(file, "r+b", buffering=0, closefd=False) as opened:
        for from_, row in zip(source_rows.tolist(), rows.tolist(), strict=True):
            _seek(opened, row, source[from_])
            opened.write(source[from_].numpy().tobytes())


def _seek(opened: BinaryIO, row: int, like: Tensor) -> int:
    """Go to a row of a file; returns how many bytes it has."""
    row_bytes = like.numel() * like.element_size()
    opened.seek(row * row_bytes)
    return row_bytes


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def slots_of_occurrences(found: Tensor, positions: Tensor) -> Tensor:
    """See :func:`torchrec_cafe.ops.slots_of_occurrences`."""
    return found[positions.long()].long()
