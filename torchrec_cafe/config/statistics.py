"""What is known of the ids that a table is looked up with, and the file it is kept in.

``torchrec-cafe profile`` writes it, the planner reads it. Standard library only.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

#: A share by a number of rows: pairs of rows and share, both ascending.
Curve = tuple[tuple[int, float], ...]

#: Version of the file's form.
FORMAT_VERSION = 1

_CURVES = ("coverage", "lru_hits", "lookahead_hits")
_INTEGERS = {"num_lookups": 1, "batch_size": 1, "drift_ids": 0}


@dataclass(frozen=True, kw_only=True)
class IdStatistics:
    """Of one table: how often which ids are looked up, and when again.

    Attributes:
        num_lookups: lookups seen, >= 1.
        num_distinct: distinct ids seen, an estimate, >= 1.
        bag_size: mean lookups of a sample (pooling factor), > 0.
        batch_size: samples of the batches that the hit rates hold for, >= 1.
        zipf_exponent: of frequency over rank, ``frequency ~ rank ** -zipf_exponent``; nan: there
            are too few ids for a fit.
        drift_per_day: share of the traffic of a day's ``drift_ids`` hottest ids that is lost if the
            day before's hottest are used instead, in [0, 1]; 0: no drift; nan: one day seen.
        drift_ids: see ``drift_per_day``, >= 0.
        coverage: rows, and the share of the lookups that go to as many most frequent ids; from 1
            to ``num_distinct`` rows, where it is 1.
        lru_hits: rows of FBGEMM's cache (32-way sets, least recently used), and the share of the
            distinct rows of a batch that lie in it when the batch is planned. May be empty.
        lookahead_hits: the same for the slots of a ``Lookahead`` table, from the distinct rows of
            the largest batch on: fewer slots refuse it. May be empty.
    """

    num_lookups: int
    num_distinct: float
    bag_size: float
    batch_size: int
    zipf_exponent: float
    drift_per_day: float
    drift_ids: int
    coverage: Curve
    lru_hits: Curve
    lookahead_hits: Curve

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TypeError: if a field is of another type.
            ValueError: if a field is out of range, or a curve is not ascending.
        """
        for field in fields(self):
            _check(field.name, getattr(self, field.name))

    def share_owning(self, rows: float) -> float:
        """Share of the lookups that go to the ``rows`` most frequent ids.

        Between the points of :attr:`coverage` it is linear in the logarithm of the rows.

        Args:
            rows: >= 0; below 1 nothing is covered.

        Returns:
            In [0, 1].
        """
        return _interpolated(self.coverage, rows)

    def lru_hit_rate(self, rows: float) -> float:
        """Share of a batch's distinct rows that FBGEMM's cache holds.

        Args:
            rows: of the cache; below the first point of :attr:`lru_hits` it is 0.

        Returns:
            In [0, 1].
        """
        return _interpolated(self.lru_hits, rows)

    def lookahead_hit_rate(self, rows: float) -> float:
        """Share of a batch's distinct rows that are in slots when the batch is planned.

        Args:
            rows: slots; below the first point of :attr:`lookahead_hits` it is 0: the batch is
                refused.

        Returns:
            In [0, 1].
        """
        return _interpolated(self.lookahead_hits, rows)

    def to_dict(self) -> dict[str, Any]:
        """The fields in types that JSON knows; nan is ``None``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if name in _CURVES:
                values[name] = [list(point) for point in value]
            elif isinstance(value, float) and math.isnan(value):
                values[name] = None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IdStatistics:
        """The statistics that :meth:`to_dict` gave.

        Args:
            values: every field by name.

        Raises:
            TypeError: if a field is of another type.
            ValueError: if a field is missing, unknown or out of range.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise TypeError(f"the statistics must be a mapping, got {values!r}")
        for name in names:
            if name not in values:
                raise ValueError(f"field {name!r} must be there, got {sorted(values)}")
        for name in values:
            if name not in names:
                raise ValueError(f"fields must be among {names}, got {name!r}")
        return cls(**{name: _from_json(name, values[name]) for name in names})


def _from_json(name: str, value: Any) -> Any:
    if name in _CURVES:
        if not isinstance(value, list) or not all(isinstance(point, list) for point in value):
            raise TypeError(f"field {name!r} must be a list of [rows, share], got {value!r:.200}")
        return tuple(tuple(point) for point in value)
    return math.nan if value is None else value


def _interpolated(curve: Curve, rows: float) -> float:
    """Linear in the logarithm of the rows; 0 before the first point, constant after the last."""
    if not rows >= 1 or not curve or rows < curve[0][0]:
        return 0.0
    at = bisect.bisect_right(curve, rows, key=lambda point: point[0])
    if at == len(curve):
        return curve[-1][1]
    (low, low_share), (high, high_share) = curve[at - 1], curve[at]
    part = math.log(rows / low) / math.log(high / low)
    return low_share + part * (high_share - low_share)


def _check(name: str, value: Any) -> None:
    """Raise unless a field is what :class:`IdStatistics` says."""
    if name in _CURVES:
        _check_curve(name, value)
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _INTEGERS:
        least = _INTEGERS[name]
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"field {name!r} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"field {name!r} must be >= {least}, got {value}")
        return
    if not is_number:
        raise TypeError(f"field {name!r} must be a number, got {value!r}")
    wanted, holds = {
        "num_distinct": ("finite and >= 1", 1 <= value < math.inf),
        "bag_size": ("finite and > 0", 0 < value < math.inf),
        "zipf_exponent": ("finite or nan", not math.isinf(value)),
        "drift_per_day": ("in [0, 1] or nan", math.isnan(value) or 0 <= value <= 1),
    }[name]
    if not holds:
        raise ValueError(f"field {name!r} must be {wanted}, got {value}")


def _check_curve(name: str, curve: Any) -> None:
    if not isinstance(curve, tuple) or not all(
        isinstance(point, tuple) and len(point) == 2 and isinstance(point[0], int)
        and isinstance(point[1], int | float)
        for point in curve
    ):  # fmt: skip
        raise TypeError(f"field {name!r} must be a tuple of (rows, share), got {curve!r:.200}")
    for (rows, share), (next_rows, next_share) in zip(curve, curve[1:], strict=False):
        if not (rows < next_rows and share <= next_share):
            raise ValueError(
                f"field {name!r} must have ascending rows and shares, got {(rows, share)} before "
                f"{(next_rows, next_share)}"
            )
    if curve and not (curve[0][0] >= 1 and curve[0][1] >= 0 and curve[-1][1] <= 1):
        raise ValueError(
            f"field {name!r} must have rows >= 1 and shares in [0, 1], got {curve[0]} to "
            f"{curve[-1]}"
        )
    if name == "coverage" and (not curve or curve[-1][1] != 1):
        raise ValueError(
            f"field {name!r} must end with a share of 1, got {curve[-1] if curve else ()}"
        )


def save_statistics(path: str | Path, statistics: Mapping[str, IdStatistics]) -> None:
    """Write the statistics of tables as JSON.

    Args:
        path: of the file; replaced if it exists.
        statistics: by table.
    """
    content = {
        "format": "torchrec_cafe.IdStatistics",
        "version": FORMAT_VERSION,
        "tables": {name: table.to_dict() for name, table in statistics.items()},
    }
    Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_statistics(path: str | Path) -> dict[str, IdStatistics]:
    """Read what :func:`save_statistics` wrote.

    Args:
        path: of the file.

    Returns:
        The statistics by table.

    Raises:
        OSError: if the file cannot be read.
        TypeError: if a field is of another type, naming file, table and field.
        ValueError: if the file is not such a file or a field is out of range, naming the same.
    """
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: must be a JSON file of `save_statistics`: {error}") from None
    tables = content.get("tables") if isinstance(content, dict) else None
    if not isinstance(tables, dict):
        raise ValueError(
            f"{path}: must be a file of `save_statistics` with `tables`, got {content!r:.100}"
        )
    if content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: version must be {FORMAT_VERSION}, got {content.get('version')!r}; write it "
            f"anew with `torchrec-cafe profile`"
        )
    statistics = {}
    for name, values in tables.items():
        try:
            statistics[name] = IdStatistics.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: table {name!r}: {error}") from None
    return statistics
