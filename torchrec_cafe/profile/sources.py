"""Traces in files: npy arrays and, through Arrow, parquet and csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from torchrec_cafe.profile.pieces import Bags, Samples

SECONDS_PER_DAY = 86_400
# Samples read at a time.
_READ = 1 << 17


class Source(Protocol):
    """A trace.

    Attributes:
        name: for messages and reports.
        num_samples: ``None``: not known before it is read.
    """

    name: str
    num_samples: int | None

    def parts(self) -> Iterator[Samples]:
        """The samples in their order; once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a file are what.

    Attributes:
        tables: name of the table by column; empty: all columns of integers or lists of them.
        day: column of the day, an integer or a date.
        time: column of the time, seconds since 1970 or a timestamp.
        header: whether csv files begin with the names of the columns; else they are f0, f1, ...
    """

    tables: Mapping[str, str]
    day: str | None = None
    time: str | None = None
    header: bool = True

    def __post_init__(self) -> None:
        """Check that the day is given once.

        Raises:
            ValueError: if there is a day and a time.
        """
        if self.day is not None and self.time is not None:
            raise ValueError(
                f"only one of the day column and the time column must be given, got {self.day!r} "
                f"and {self.time!r}"
            )

    @property
    def when(self) -> str | None:
        """The column that says the day, if any."""
        return self.time if self.day is None else self.day

    def select(self, available: Sequence[str], usable: Sequence[str], where: object) -> list[str]:
        """The columns of ids.

        Args:
            available: all columns of a file.
            usable: those that may hold ids.
            where: the file, for messages.

        Raises:
            ValueError: if a column is not there, or none is left.
        """
        for column in (*self.tables, *([self.when] if self.when else [])):
            if column not in available:
                raise ValueError(
                    f"{where}: columns must be among {list(available)}, got {column!r}"
                )
        chosen = list(self.tables) or [column for column in usable if column != self.when]
        if not chosen:
            raise ValueError(
                f"{where}: there must be columns of integers or lists of integers, got "
                f"{list(available)}"
            )
        return chosen

    def table_of(self, column: str) -> str:
        """The table that a column's ids are of."""
        return self.tables.get(column, column)


def days_of_seconds(seconds: NDArray[Any]) -> NDArray[np.int64]:
    """Days since 1970.

    Args:
        seconds: since 1970, integers or floats.
    """
    return np.floor_divide(seconds, SECONDS_PER_DAY).astype(np.int64)


class NpySource:
    """Arrays of integers: ``[N]`` or ``[N, tables]`` in one file, or ``[N]`` in one for each table.

    Columns of an ``[N, tables]`` array are named ``0``, ``1``, ...; an ``[N]`` array has the name
    of its file.

    Args:
        paths: the files.
        columns: of the arrays.
    """

    def __init__(self, paths: Sequence[Path], columns: Columns) -> None:
        """Map the files; see the class.

        Raises:
            TypeError: if an array is not of integers.
            ValueError: if shapes do not fit, or a column is not there.
        """
        self.name = ", ".join(str(path) for path in paths)
        arrays: dict[str, NDArray[Any]] = {}
        for path in paths:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.ndim == 2 and len(paths) == 1:
                arrays |= {str(number): array[:, number] for number in range(array.shape[1])}
            elif array.ndim == 1:
                arrays[path.stem] = array
            else:
                raise ValueError(
                    f"{path}: must be [N], or the only file and [N, tables], got {array.shape}"
                )
        usable = [name for name, array in arrays.items() if array.dtype.kind in "iu"]
        self._columns = columns
        chosen = columns.select(list(arrays), usable, self.name)
        for name in chosen:
            if name not in usable:
                raise TypeError(
                    f"{self.name}: column {name!r} must have integers, got {arrays[name].dtype}"
                )
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{self.name}: arrays must be of equal length, got {sizes}")
        self._arrays = {name: arrays[name] for name in chosen}
        self._when = None if columns.when is None else arrays[columns.when]
        self.num_samples: int | None = max(sizes.values())

    def parts(self) -> Iterator[Samples]:
        """The samples in their order."""
        assert self.num_samples is not None
        for begin in range(0, self.num_samples, _READ):
            end = min(begin + _READ, self.num_samples)
            bags = {
                self._columns.table_of(name): Bags(array[begin:end].astype(np.int64))
                for name, array in self._arrays.items()
            }
            yield Samples(bags, end - begin, self._days(begin, end))

    def _days(self, begin: int, end: int) -> NDArray[np.int64] | None:
        if self._when is None:
            return None
        when = self._when[begin:end]
        return when.astype(np.int64) if self._columns.time is None else days_of_seconds(when)
