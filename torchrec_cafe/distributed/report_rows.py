"""What a plan's options say, as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torchrec.distributed.planner.types import ShardingOption, Topology

from torchrec_cafe.distributed.grouping import Groups
from torchrec_cafe.distributed.plan_report import PlannedRow, PlanReport
from torchrec_cafe.distributed.planned_bytes import PlannedTable
from torchrec_cafe.distributed.table_collections import Collection, TableConfig, configs_of

if TYPE_CHECKING:
    from torchrec_cafe.distributed.budget_mode import Choice


def make_report(
    collections: Sequence[tuple[str, Collection]],
    options: Sequence[ShardingOption],
    groups: Groups,
    planned: Mapping[str, PlannedTable],
    topology: Topology,
    choice: Choice | None,
) -> PlanReport:
    """A plan's report.

    Args:
        collections: of the model, by path.
        options: of the plan, with ranks.
        groups: of the tables that have a kind.
        planned: these tables.
        topology: of the plan, with the memory that tables may take.
        choice: of budget mode, if any.
    """
    configs = {
        (path, config.name): config
        for path, collection in collections
        for config in configs_of(collection)
    }
    of_table = {name: group for of in groups.values() for name, group in of.items()}
    # Tables of a pool that stays together follow its first one.
    ranks = {option.name: _ranks(option) for option in options}
    ranks |= {
        name: ranks[group.tables[0].name]
        for name, group in of_table.items()
        if group.stays_together and group.tables[0].name in ranks
    }
    on_cpu = topology.compute_device == "cpu"
    rows = []
    loads = [[0] * topology.world_size for _ in range(2)]
    times = [0.0] * topology.world_size
    for option in options:
        config = configs.get((option.path, option.name))
        device, host = _bytes(option, on_cpu=on_cpu)
        for shard, d, h in zip(option.shards, device, host, strict=True):
            rank = shard.rank or 0
            loads[0][rank] += d
            loads[1][rank] += h
            times[rank] += shard.perf.total if shard.perf is not None else 0.0
        table = planned.get(option.name)
        chosen = choice.options.get(option.name) if choice else None
        rows.append(
            PlannedRow(
                table=option.name,
                kept=_kept(option) if table is None else str(table.group.kind),
                sharding_type=option.sharding_type,
                ranks=ranks[option.name],
                dense_bytes=_dense_bytes(option, config),
                device_bytes=sum(device),
                host_bytes=sum(host),
                milliseconds=max((s.perf.total for s in option.shards if s.perf), default=0.0),
                risk=chosen.risk if chosen else (0.0 if table is None else None),
                why=choice.why.get(option.name, "") if choice else "",
            )
        )
    order = {name: number for number, (_, name) in enumerate(configs)}
    rows.sort(key=lambda row: order.get(row.table, len(order)))
    storages = [device.storage for device in topology.devices]
    return PlanReport(
        rows=tuple(rows),
        device_bytes_of_ranks=tuple(loads[0]),
        host_bytes_of_ranks=tuple(loads[1]),
        device_limit=min(storage.ddr if on_cpu else storage.hbm for storage in storages),
        milliseconds=max(times),
    )


def _ranks(option: ShardingOption) -> tuple[int, ...]:
    return tuple(sorted({shard.rank for shard in option.shards if shard.rank is not None}))


def _bytes(option: ShardingOption, *, on_cpu: bool) -> tuple[list[int], list[int]]:
    storages = [shard.storage for shard in option.shards]
    if on_cpu:
        return [s.ddr if s else 0 for s in storages], [0] * len(storages)
    return [s.hbm if s else 0 for s in storages], [s.ddr if s else 0 for s in storages]


def _kept(option: ShardingOption) -> str:
    load_factor = option.cache_load_factor
    cached = f"({load_factor:g})" if load_factor is not None else ""
    return f"{option.compute_kernel}{cached}"


def _dense_bytes(option: ShardingOption, config: TableConfig | None) -> int:
    rows = option.tensor.shape[0] if config is None else config.num_embeddings
    return rows * option.tensor.shape[1] * option.tensor.element_size()
