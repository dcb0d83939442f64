"""Look-ahead tables: every row exact, most of them elsewhere. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torchrec_cafe.config.budget import TableKind, budget_of, check_arguments
from torchrec_cafe.config.memory import SLOT_MAP_BYTES, Allocation, MemoryBreakdown, TableShape


@dataclass(frozen=True, kw_only=True)
class Lookahead(TableKind):
    """The whole table lies in host memory or a file; slots hold the rows of the coming batches.

    What is trained is the uncompressed table, bit for bit. All look-ahead tables of a group (same
    dim, dtype, pooling, kind) share their slots. With
    :class:`torchrec_cafe.LookaheadTrainPipeline` rows are in their slots before a batch asks for
    them; without it lookups wait for them.

    Reference: ScratchPipe (ISCA 2022); BagPipe (SOSP 2023).

    Attributes:
        cache_fraction: slots divided by rows, in (0, 1]. The slots must hold at least the distinct
            rows of one batch; with those of all batches that are looked ahead for, nothing waits.
        min_slots: slots of a rank's pool, whatever the fraction says, as long as it has rows for
            them, >= 1: small tables are in slots as a whole.
        path: directory of files for the rows, a fast local disk; each training needs its own.
            ``None``: host memory.
        io_threads: reads and writes of files at a time, per rank, in [1, 1024]; where slots are on
            a GPU, threads that copy rows in host memory.
    """

    cache_fraction: float = 0.05
    min_slots: int = 16384
    path: str | None = None
    io_threads: int = 16

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if an argument is out of range.
        """
        checks = {
            "cache_fraction": ("in (0, 1]", 0 < self.cache_fraction <= 1),
            "min_slots": (">= 1", self.min_slots >= 1),
            "path": ("a directory or None", self.path is None or self.path != ""),
            "io_threads": ("in [1, 1024]", 1 <= self.io_threads <= 1024),
        }
        check_arguments(self, checks)

    def slots_for(self, num_rows: int) -> int:
        """Slots of a pool that has so many rows.

        Args:
            num_rows: >= 0.
        """
        return max(1, math.ceil(self.cache_fraction * num_rows), min(self.min_slots, num_rows))

    def allocate(self, tables: Sequence[TableShape]) -> Allocation:
        """Slots for the tables of a group.

        Args:
            tables: tables of equal dim and dtype that share the slots.
        """
        dense_bytes = budget_of(tables, 1.0)
        num_rows = sum(table.num_embeddings for table in tables)
        num_slots = self.slots_for(num_rows)
        memory = MemoryBreakdown(
            shared_bytes=0,
            hot_bytes=num_slots * tables[0].row_bytes,
            sketch_bytes=0,
            map_bytes=num_slots * SLOT_MAP_BYTES,
            dense_bytes=dense_bytes,
            backing_bytes=dense_bytes,
        )
        rows = {table.name: table.num_embeddings for table in tables}
        return Allocation(shared_rows=MappingProxyType(rows), memory=memory, num_slots=num_slots)
