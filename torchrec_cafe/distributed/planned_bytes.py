"""How many bytes a table with a kind takes on each of its ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torchrec.distributed.types import ShardingType

from torchrec_cafe.config import Lookahead
from torchrec_cafe.config.memory import SLOT_MAP_BYTES
from torchrec_cafe.distributed.optimizers import OptimizerState
from torchrec_cafe.distributed.types import CompressedGroup, CompressedTable


@dataclass(frozen=True)
class PlannedTable:
    """A table as the planner sees it: bytes on each of its ranks.

    Of tables that share a pool, the pool is divided in proportion to their ids; of a pool that
    stays on one rank or host, all is the first table's, which stands for the others.

    Attributes:
        group: the table's group.
        row_bytes: of one row.
        device: bytes in the memory of the compute device: rows, sketch, maps, optimizer state.
        host: bytes in host memory besides; 0 if that is the compute device's.
        disk: bytes in files.
        slots: of a look-ahead table on each of its ranks; 0 of others.
    """

    group: CompressedGroup
    row_bytes: int
    device: tuple[int, ...]
    host: tuple[int, ...]
    disk: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of a fused table that takes as many bytes of the device, on each rank."""
        return tuple(max(1, math.ceil(part / self.row_bytes)) for part in self.device)


def plan_table(
    group: CompressedGroup,
    name: str,
    num_ranks: int,
    *,
    row_bytes: int,
    state: OptimizerState,
    on_cpu: bool,
) -> PlannedTable:
    """The bytes of a table of a group.

    Args:
        group: the table's group.
        name: of the table.
        num_ranks: over how many ranks a table is spread.
        row_bytes: bytes of a row.
        state: what the optimizer keeps for a row.
        on_cpu: whether the compute device is the CPU.
    """
    table, dim_state = group.table(name), state.bytes_per_row
    if isinstance(group.kind, Lookahead):
        return _plan_lookahead(group, group.kind, table, num_ranks, row_bytes, state, on_cpu=on_cpu)
    if group.sharding_type == ShardingType.DATA_PARALLEL.value:
        bounds, dim_state = [0, table.shared_rows], 0  # the dense optimizer's
    else:
        bounds = group.row_bounds(table, num_ranks)
    parts = [(end - begin) * (row_bytes + dim_state) for begin, end in pairwise(bounds)]
    if group.has_pool:
        cuts = [0, group.num_shards] if len(parts) == 1 else group.shard_bounds(num_ranks)
        share = _share(group, table)
        shard_bytes = _shard_bytes(group, row_bytes, dim_state, state)
        for number, (begin, end) in enumerate(pairwise(cuts)):
            parts[number] += round(share * (end - begin) * shard_bytes)
    if group.stays_together and table != group.tables[0]:
        parts = [0] * len(parts)
    elif group.stays_together:
        others = [group.row_bounds(other, num_ranks) for other in group.tables[1:]]
        for bounds in others:
            for number, (begin, end) in enumerate(pairwise(bounds)):
                parts[number] += (end - begin) * (row_bytes + dim_state)
    nothing = (0,) * len(parts)
    return PlannedTable(group, row_bytes, tuple(parts), nothing, nothing, nothing)


def _share(group: CompressedGroup, table: CompressedTable) -> float:
    """Which part of the pool counts as the table's."""
    if group.stays_together:
        return 1.0 if table == group.tables[0] else 0.0
    tracked = [other for other in group.tables if other.index >= 0]
    if not tracked:
        return 1 / len(group.tables)
    return table.num_ids / sum(t.num_ids for t in tracked) if table.index >= 0 else 0.0


def _shard_bytes(
    group: CompressedGroup, row_bytes: int, dim_state: int, state: OptimizerState
) -> float:
    """Bytes of a virtual shard of a pool: rows, weights, sketch, maps, optimizer state."""
    shared = sum(table.shared_rows for table in group.tables) * row_bytes
    resident = (group.resident_bytes - shared) / group.num_shards
    weight_state = 0.0
    if dim_state > 0:
        per_row = group.weights_per_row
        weight_state = state.of_row(per_row) / per_row * group.weights_per_shard
    return resident + group.pool_rows_per_shard * dim_state + weight_state


def _plan_lookahead(
    group: CompressedGroup,
    kind: Lookahead,
    table: CompressedTable,
    num_ranks: int,
    row_bytes: int,
    state: OptimizerState,
    *,
    on_cpu: bool,
) -> PlannedTable:
    full_row = row_bytes + state.bytes_per_row
    device, host, disk, of_ranks = [], [], [], []
    for begin, end in pairwise(group.row_bounds(table, num_ranks)):
        rows = end - begin
        # Tables of a rank share its slots; which other tables a rank has is not known yet, but of
        # row-wise ones.
        together = rows
        if group.sharding_type == ShardingType.ROW_WISE.value:
            together = sum(-(-other.num_ids // num_ranks) for other in group.tables)
        slots = kind.slots_for(together) * rows / max(1, together)
        in_file = rows * full_row if kind.path is not None else 0
        # The state of row-wise optimizers stays in memory, and so do the maps.
        in_memory = rows * (full_row if in_file == 0 else state.bytes_if_one_value)
        if in_file:
            in_file -= rows * state.bytes_if_one_value
        in_memory += math.ceil(slots * SLOT_MAP_BYTES)
        on_device = math.ceil(slots * full_row)
        device.append(on_device + (in_memory if on_cpu else 0))
        host.append(0 if on_cpu else in_memory)
        disk.append(in_file)
        of_ranks.append(math.ceil(slots))
    bytes_ = tuple(device), tuple(host), tuple(disk)
    return PlannedTable(group, row_bytes, *bytes_, tuple(of_ranks))
