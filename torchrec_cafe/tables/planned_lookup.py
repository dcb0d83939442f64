"""A batch on its way through a scratchpad, and what is counted on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchrec_cafe.ops import PooledKeys
from torchrec_cafe.tables.device_streams import Mark
from torchrec_cafe.tables.slot_memory import PlacedBags


class ScratchpadFullError(RuntimeError):
    """A batch needs more rows at once than the scratchpad has slots."""


@dataclass
class LookaheadStatistics:
    """What a scratchpad has done so far.

    Attributes:
        batches: batches that were looked up.
        rows: distinct rows of these batches.
        hits: rows that lay in a slot when their batch was planned.
        fills: rows that were brought in, also for batches that were not looked up then.
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

    def __str__(self) -> str:
        """One line for a report."""
        rows = max(1, self.rows)
        hidden = self.seconds_hidden / max(self.seconds_moving, 1e-9)
        return (
            f"{self.batches} batches, {self.rows} rows: {self.hits / rows:.1%} were in slots, "
            f"{self.fills} brought in ({self.bytes_in / 2**20:.1f} MiB in, "
            f"{self.bytes_out / 2**20:.1f} MiB out, {self.critical_misses} on the critical path); "
            f"{self.seconds_moving:.1f} s moving, {hidden:.0%} of it hidden"
        )

    def scalars(self) -> dict[str, float]:
        """All of it by name, for TensorBoard or a report."""
        return dataclasses.asdict(self) | {"seconds_hidden": self.seconds_hidden}


@dataclass(eq=False)
class PlannedLookup:
    """The rows of a batch, and where they lie once it is ready.

    Attributes:
        make_bags: makes :attr:`bags`; called by the mover.
        train: whether rows may change.
        number: of the batch.
        ahead: whether it is looked up later, and can be planned until then.
        bags: the row of each occurrence, when it is announced.
        placed: the slot of each occurrence, when it is planned.
        ready: when the rows are in their slots.
        done: when the training has no use for them any more; set whenever it has used them.
        refused: why it will never be ready.
    """

    make_bags: Callable[[], PooledKeys]
    train: bool
    number: int
    ahead: bool
    bags: PooledKeys | None = None
    placed: PlacedBags | None = None
    ready: Mark | None = None
    done: Mark | None = None
    refused: Exception | None = None
    # What the mover knows: distinct rows, the position of each occurrence among them, their slots.
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    held: Tensor | None = None
    fills: int = 0  # rows that had to be brought in
    # What the training says: it is looked up; its rows are not needed any more.
    begun: bool = False
    released: bool = False
