"""A trace on its way: samples as they are read, cut into pieces of whole batches of one day.

Shape legend: S samples, N lookups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Pieces end at so many lookups of a table: what a piece takes in memory, 60 bytes a lookup at most.
_PIECE_LOOKUPS = 1 << 20
# and at so many batches: within a piece, distances are counted batch by batch.
_PIECE_BATCHES = 512


class Bags(NamedTuple):
    """The lookups of one table.

    Attributes:
        ids: int64 ``[N]``.
        lengths: int64 ``[S]``, ids of each sample; ``None``: one each.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Samples:
    """Consecutive samples of a trace.

    Attributes:
        bags: by table.
        size: number of samples.
        days: int64 ``[S]``, the day of each; ``None``: not known.
    """

    bags: Mapping[str, Bags]
    size: int
    days: NDArray[np.int64] | None = None

    def split(self, at: int) -> tuple[Samples, Samples]:
        """The first ``at`` samples and the others, as views."""
        first, second = {}, {}
        for name, (ids, lengths) in self.bags.items():
            if lengths is None:
                first[name], second[name] = Bags(ids[:at]), Bags(ids[at:])
            else:
                cut = int(lengths[:at].sum())
                first[name] = Bags(ids[:cut], lengths[:at])
                second[name] = Bags(ids[cut:], lengths[at:])
        days = (None, None) if self.days is None else (self.days[:at], self.days[at:])
        return Samples(first, at, days[0]), Samples(second, self.size - at, days[1])

    def batch_of_ids(self, name: str, batch_size: int) -> NDArray[np.uint64]:
        """Number of the batch of each id of a table; the first sample begins batch 0."""
        batches = np.arange(-(-self.size // batch_size), dtype=np.uint64)
        of_samples = np.repeat(batches, batch_size)[: self.size]
        lengths = self.bags[name].lengths
        return of_samples if lengths is None else np.repeat(of_samples, lengths)


def joined(parts: list[Samples]) -> Samples:
    """Samples in a row.

    Args:
        parts: at least one, with the same tables; all with days or none.
    """
    if len(parts) == 1:
        return parts[0]
    bags = {}
    for name in parts[0].bags:
        ids = np.concatenate([part.bags[name].ids for part in parts])
        lengths = None
        if any(part.bags[name].lengths is not None for part in parts):
            lengths = np.concatenate([_lengths(part, name) for part in parts])
        bags[name] = Bags(ids, lengths)
    days = [part.days for part in parts if part.days is not None]
    return Samples(bags, sum(part.size for part in parts), np.concatenate(days) if days else None)


def _lengths(samples: Samples, name: str) -> NDArray[np.int64]:
    lengths = samples.bags[name].lengths
    return np.ones(samples.size, dtype=np.int64) if lengths is None else lengths


class Piece(NamedTuple):
    """Consecutive batches of one day.

    Attributes:
        samples: the piece's; all batches are whole but the trace's last.
        begin: number of the first sample in the trace, a multiple of the batch size.
        day: of the first sample of each of its batches.
    """

    samples: Samples
    begin: int
    day: int


def cut_into_pieces(parts: Iterable[Samples], batch_size: int) -> Iterator[Piece]:
    """Cut a trace at batches and days.

    A batch is of the day of its first sample. A piece has at most a million lookups of a table
    and 512 batches, unless one batch alone has more.

    Args:
        parts: the trace, in parts of any size.
        batch_size: samples of a batch.

    Raises:
        ValueError: if a day comes before another that is earlier.
    """
    held: list[Samples] = []
    begin = 0
    last_day: int | None = None
    for part in _with_end(parts):
        held += [part] if part is not None else []
        size = sum(samples.size for samples in held)
        limit = _piece_samples(held, size, batch_size)
        least = limit if part is not None else 1  # what is left at the end is a piece, too
        if size < least:
            continue
        rest = joined(held)
        while rest.size >= least:
            cut, day = _same_day(rest, min(limit, rest.size), batch_size)
            if last_day is not None and day < last_day:
                raise ValueError(
                    f"the days of a trace must ascend, got day {day} after day {last_day} at "
                    f"sample {begin}; sort the trace by time"
                )
            last_day = day
            samples, rest = rest.split(cut)
            yield Piece(samples, begin, day)
            begin += cut
        held = [rest] if rest.size else []


def _with_end(parts: Iterable[Samples]) -> Iterator[Samples | None]:
    """The parts, then ``None``."""
    yield from parts
    yield None


def _piece_samples(parts: list[Samples], size: int, batch_size: int) -> int:
    """Samples of a piece, a multiple of the batch size.

    Args:
        parts: what is there of it.
        size: their samples.
        batch_size: samples of a batch.
    """
    tables = parts[0].bags if parts else ()
    lookups = max((sum(len(part.bags[name].ids) for part in parts) for name in tables), default=0)
    per_batch = max(1.0, lookups * batch_size / max(1, size))
    return batch_size * int(min(_PIECE_BATCHES, max(1.0, _PIECE_LOOKUPS // per_batch)))


def _same_day(samples: Samples, size: int, batch_size: int) -> tuple[int, int]:
    """How many of the first ``size`` samples are of whole batches of the first's day, and which."""
    if samples.days is None:
        return size, 0
    days = samples.days[:size:batch_size]
    others = np.flatnonzero(days != days[0])
    return (int(others[0]) * batch_size if len(others) else size), int(days[0])
