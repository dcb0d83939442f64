"""What a plan decides for each table, to print or to read by a program."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchrec_cafe.config.text import human_bytes


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """What a plan says of a table.

    Attributes:
        table: name of the table.
        kept: how it is kept: a kind, or TorchRec's compute kernel.
        sharding_type: how it is sharded.
        ranks: that have a part of it.
        dense_bytes: of the plain table, without optimizer state.
        device_bytes: memory of compute devices, over all ranks, with optimizer state, inputs and
            outputs, as estimated; of tables that share a pool the pool is counted at the first or
            in parts.
        host_bytes: host memory besides.
        milliseconds: of a step, estimated, on its slowest rank.
        risk: share of the lookups whose rows other ids share; ``None``: unknown.
        why: why it was chosen; empty if it was asked for.
    """

    table: str
    kept: str
    sharding_type: str
    ranks: tuple[int, ...]
    dense_bytes: int
    device_bytes: int
    host_bytes: int
    milliseconds: float
    risk: float | None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What a plan decides.

    Attributes:
        rows: of each table, in the order of the model.
        device_bytes_of_ranks: planned memory of the compute device of each rank.
        host_bytes_of_ranks: planned host memory of each rank.
        device_limit: bytes that each rank has for tables.
        milliseconds: of a step, estimated, of the slowest rank.
    """

    rows: Sequence[PlannedRow]
    device_bytes_of_ranks: Sequence[int]
    host_bytes_of_ranks: Sequence[int]
    device_limit: int
    milliseconds: float
    #: Most rows that are printed; the rest are summed up.
    max_printed: int = field(default=200, repr=False)
    #: Most ranks whose bytes are printed one by one.
    max_ranks: int = field(default=16, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        values = dataclasses.asdict(self)
        del values["max_printed"], values["max_ranks"]
        for row in values["rows"]:
            row["ranks"] = _ranges(row["ranks"])
        return values

    def to_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        """A table for people."""
        header = ("table", "kept", "sharding", "ranks", "dense", "planned", "host", "ms", "shared")
        lines: list[tuple[str, ...]] = [(*header, "why")]
        for row in self.rows[: self.max_printed]:
            lines.append(_cells(row))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        if len(self.rows) > self.max_printed:
            text.append(f"... and {len(self.rows) - self.max_printed} more tables")
        return "\n".join([*text, *self._totals()])

    def _totals(self) -> list[str]:
        dense = sum(row.dense_bytes for row in self.rows)
        used, most = sum(self.device_bytes_of_ranks), max(self.device_bytes_of_ranks)
        host = sum(self.host_bytes_of_ranks)
        kinds: dict[str, int] = {}
        for row in self.rows:
            name = row.kept.split("(", 1)[0]
            kinds[name] = kinds.get(name, 0) + 1
        counted = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
        return [
            f"{len(self.rows)} tables: {counted}",
            f"{human_bytes(dense)} of plain tables, {human_bytes(used)} planned on "
            f"{len(self.device_bytes_of_ranks)} ranks (most on one: {human_bytes(most)} of "
            f"{human_bytes(self.device_limit)}), {human_bytes(host)} of host memory besides; "
            f"{self.milliseconds:.3g} ms a step estimated for the slowest rank",
            *self._by_rank(),
        ]

    def _by_rank(self) -> list[str]:
        if len(self.device_bytes_of_ranks) > self.max_ranks:
            return []
        of_ranks = zip(self.device_bytes_of_ranks, self.host_bytes_of_ranks, strict=True)
        parts = [
            f"rank {rank}: {human_bytes(device)}" + (f" and {human_bytes(host)}" if host else "")
            for rank, (device, host) in enumerate(of_ranks)
        ]
        return ["; ".join(parts)]


def _cells(row: PlannedRow) -> tuple[str, ...]:
    return (
        row.table,
        row.kept,
        row.sharding_type,
        _ranges(row.ranks),
        human_bytes(row.dense_bytes),
        human_bytes(row.device_bytes),
        human_bytes(row.host_bytes) if row.host_bytes else "",
        f"{row.milliseconds:.3g}",
        "unknown" if row.risk is None else f"{row.risk:.0%}",
        row.why,
    )


def _ranges(ranks: Sequence[int]) -> str:
    """``0-7, 16`` of sorted numbers."""
    parts: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
