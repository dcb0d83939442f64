"""The report of a profile: its figures as text, shared by the printed table and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchrec_cafe.config import IdStatistics, TableShape
from torchrec_cafe.config.text import as_text, human_bytes, three_digits
from torchrec_cafe.profile.costs import CacheCost, CompressionCost, Owning, column_of

_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """What is known of one table.

    Attributes:
        name: of the table.
        statistics: of its ids.
        shape: of the table.
        owning: what Cafe gives it at each compression; ``None``: refused.
        caches: of each size.
    """

    name: str
    statistics: IdStatistics
    shape: TableShape
    owning: Sequence[Owning | None]
    caches: Sequence[CacheCost]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known of a trace.

    Attributes:
        source: of the trace.
        command: that made it.
        num_samples: of the trace.
        depth: batches that look-ahead tables know ahead.
        costs: Cafe at each compression.
        tables: in their order.
    """

    source: str
    command: str
    num_samples: int
    depth: int
    costs: Sequence[CompressionCost]
    tables: Sequence[TableReport]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all uncompressed tables."""
        return sum(table.shape.dense_bytes for table in self.tables)


def table_reports(
    statistics: Mapping[str, IdStatistics],
    shapes: Mapping[str, TableShape],
    costs: Sequence[CompressionCost],
    caches: Mapping[str, Sequence[CacheCost]],
) -> list[TableReport]:
    """Put together what is known of each table.

    Args:
        statistics: by table.
        shapes: by table.
        costs: Cafe at each compression.
        caches: by table, of each size.
    """
    return [
        TableReport(
            name=name,
            statistics=statistics[name],
            shape=shapes[name],
            owning=column_of(costs, name),
            caches=caches[name],
        )
        for name in statistics
    ]


def count(value: float) -> str:
    """A number of things in three digits: 12.3M."""
    for unit, size in _UNITS:
        if value >= 0.9995 * size:
            return f"{three_digits(value / size)}{unit}"
    return f"{value:.0f}"


def percent(share: float | None) -> str:
    """A share in percent; a dash if there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def fixed(value: float) -> str:
    """Two digits after the point; a dash for nan."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def compression_text(compression: float) -> str:
    """``100x`` with the right sign."""
    return f"{compression:,.15g}×".replace(",", "\u202f")


def printed(report: Report) -> str:
    """The figures for a terminal.

    Args:
        report: of the trace.
    """
    labels = [cache.label for cache in report.tables[0].caches]
    header = ["table", "rows", "distinct", "lookups", "a sample", "Zipf", "drift a day %"]
    header += [f"own row % {compression_text(cost.compression)}" for cost in report.costs]
    header += [f"hits % {label} LRU/ahead" for label in labels]
    rows = [header]
    for table in report.tables:
        statistics = table.statistics
        row = [table.name, count(table.shape.num_embeddings), count(statistics.num_distinct)]
        row += [count(statistics.num_lookups), fixed(statistics.bag_size)]
        row += [fixed(statistics.zipf_exponent), percent(statistics.drift_per_day)]
        row += [percent(None if owning is None else owning.share) for owning in table.owning]
        row += [f"{percent(cache.lru)}/{percent(cache.lookahead)}" for cache in table.caches]
        rows.append(row)
    lines = [as_text(rows), ""]
    lines.append(f"all tables uncompressed: {human_bytes(report.dense_bytes)}")
    lines += [f"  {line}" for line in map(compression_line, report.costs)]
    return "\n".join(lines)


def compression_line(cost: CompressionCost) -> str:
    """What a compression costs and catches, in a line.

    Args:
        cost: of the compression.
    """
    name = f"Cafe {compression_text(cost.compression)}"
    if cost.refused:
        return f"{name}: refused: {cost.refused}"
    whole = sum(owning.is_whole for owning in cost.owning.values())
    return f"{name}: {human_bytes(cost.resident_bytes)}, {whole} of {len(cost.owning)} tables whole"
