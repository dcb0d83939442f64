"""One pass over a trace: every table learns its part, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from torchrec_cafe.config import IdStatistics
from torchrec_cafe.profile.pieces import Samples, cut_into_pieces
from torchrec_cafe.profile.sources import Source
from torchrec_cafe.profile.table import TableProfile, TraceOptions


@dataclass(frozen=True)
class Profile:
    """What a pass over a trace gave.

    Attributes:
        statistics: by table.
        largest_ids: largest id of each table.
        num_samples: samples of the trace.
    """

    statistics: dict[str, IdStatistics]
    largest_ids: dict[str, int]
    num_samples: int


def profile_trace(
    source: Source, options: TraceOptions, *, days: int | None = None, progress: bool = False
) -> Profile:
    """Read a trace once and learn its tables.

    Args:
        source: of the trace.
        options: of the profile.
        days: cut the trace into so many equal parts, and call them days; ``None``: the days are
            those of the source, or all is one day.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if there are no samples, an id is negative, the days do not ascend, or equal
            parts are asked of a trace whose length is not known.
    """
    if days is not None and not (days >= 1 and source.num_samples is not None):
        raise ValueError(
            f"{source.name}: for {days} equal days they must be >= 1 and the number of samples "
            f"known, got {source.num_samples} samples; give it with --samples, or a day column"
        )
    tables: dict[str, TableProfile] = {}
    num_samples = 0
    day: int | None = None
    parts = source.parts() if days is None else _equal_days(source, days)
    with tqdm(
        total=source.num_samples, unit=" samples", unit_scale=True, disable=not progress
    ) as bar:
        for piece in cut_into_pieces(parts, options.batch_size):
            if day is not None and piece.day != day:
                for table in tables.values():
                    table.end_day()
            day = piece.day
            _learn(tables, piece.samples, piece.begin, options)
            num_samples += piece.samples.size
            bar.update(piece.samples.size)
    if num_samples == 0:
        raise ValueError(f"{source.name}: there must be samples, got none")
    for table in tables.values():
        table.end_day()
    statistics = {}
    for name, table in tables.items():
        try:
            statistics[name] = table.statistics()
        except ValueError as error:
            raise ValueError(f"{source.name}: table {name!r}: {error}") from None
    largest = {name: table.largest_id for name, table in tables.items()}
    return Profile(statistics, largest, num_samples)


def _learn(
    tables: dict[str, TableProfile], samples: Samples, begin: int, options: TraceOptions
) -> None:
    for name, bags in samples.bags.items():
        if len(bags.ids) and int(bags.ids.min()) < 0:
            raise ValueError(
                f"table {name!r}: ids must be >= 0, got {bags.ids.min()} among samples {begin} to "
                f"{begin + samples.size}; leave padding out"
            )
        table = tables.setdefault(name, TableProfile(options))
        batches = samples.batch_of_ids(name, options.batch_size)
        table.add(bags.ids, batches, range(begin, begin + samples.size))


def _equal_days(source: Source, days: int) -> Iterator[Samples]:
    """The samples, with days of equal length."""
    begin, total = 0, max(1, source.num_samples or 0)
    for part in source.parts():
        numbers = np.arange(begin, begin + part.size) * days // total
        yield replace(part, days=np.minimum(numbers, days - 1))
        begin += part.size
