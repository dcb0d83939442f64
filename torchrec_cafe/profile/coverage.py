"""How the lookups spread over the ids: coverage by rank, and its Zipf exponent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Points of a curve for each tenfold number of rows.
_POINTS_PER_DECADE = 16
# Ranks whose ids were seen less often are left out of the fit: their order is that of chance.
_FEWEST_LOOKUPS = 10


@dataclass(frozen=True)
class Frequencies:
    """Ids in groups of equal frequency.

    Attributes:
        lookups: float64 ``[n]``, descending, of each id of a group.
        ids: float64 ``[n]``, > 0, how many ids the group stands for.
    """

    lookups: NDArray[np.float64]
    ids: NDArray[np.float64]

    @classmethod
    def exact(cls, lookups: NDArray[np.int64]) -> Frequencies:
        """Of ids that were all counted.

        Args:
            lookups: int64 ``[n]``, of each id.
        """
        ordered = np.sort(lookups)[::-1].astype(np.float64)
        return cls(ordered, np.ones(len(ordered)))

    @classmethod
    def estimated(
        cls,
        hot: NDArray[np.float64],
        sampled: NDArray[np.int64],
        num_lookups: int,
        num_distinct: float,
    ) -> Frequencies:
        """Of the hottest ids and a sample of the others.

        Args:
            hot: float64 ``[h]``, lookups of the hottest ids.
            sampled: int64 ``[s]``, lookups of sampled ids that are not among them.
            num_lookups: of all ids.
            num_distinct: all ids.
        """
        if len(sampled) == 0:
            return cls(np.sort(hot)[::-1], np.ones(len(hot)))
        # What the sample stands for is known better than it says: the ids and the lookups left.
        each = max(1.0, (num_distinct - len(hot)) / len(sampled))
        scale = max(1.0, num_lookups - hot.sum()) / (each * sampled.sum())
        lookups = np.concatenate([hot, sampled * scale])
        ids = np.concatenate([np.ones(len(hot)), np.full(len(sampled), each)])
        order = np.argsort(-lookups, kind="stable")
        return cls(lookups[order], ids[order])

    def coverage(self) -> tuple[tuple[int, float], ...]:
        """The share of the lookups that go to the most frequent ids, by their number."""
        ranks = np.append(0.0, np.cumsum(self.ids))
        covered = np.append(0.0, np.cumsum(self.ids * self.lookups))
        rows = log_spaced(1, max(1, round(ranks[-1])))
        shares = np.interp(rows, ranks, covered / covered[-1])
        shares[-1] = 1.0
        points = np.maximum.accumulate(shares.clip(0, 1))
        return tuple(zip(rows.tolist(), points.tolist(), strict=True))


def log_spaced(first: int, last: int) -> NDArray[np.int64]:
    """Distinct integers from ``first`` to ``last``, 16 for each tenfold, both ends among them.

    Args:
        first: >= 1.
        last: >= ``first``.
    """
    size = 2 + math.ceil(_POINTS_PER_DECADE * math.log10(last / first))
    return np.unique(np.rint(np.geomspace(first, last, size)).astype(np.int64))


def zipf_exponent(coverage: tuple[tuple[int, float], ...], num_lookups: int) -> float:
    """Slope of the logarithm of the frequency over that of the rank, negated; least squares.

    Each sixteenth of a decade of ranks counts the same. Ranks of ids with less than ten lookups
    are left out, unless all have less.

    Args:
        coverage: as :meth:`Frequencies.coverage` gives it.
        num_lookups: of all ids.

    Returns:
        The exponent, or nan if there are less than three points.
    """
    rows = np.array([0, *(point[0] for point in coverage)], dtype=np.float64)
    lookups = np.array([0, *(point[1] for point in coverage)]) * num_lookups
    frequency = np.diff(lookups) / np.diff(rows)
    rank = (rows[1:] + rows[:-1] + 1) / 2  # mean of the ranks of a step
    often = frequency >= _FEWEST_LOOKUPS
    often = often if often.any() else frequency > 0
    if np.count_nonzero(often) < 3:
        return math.nan
    slope, _ = np.polyfit(np.log(rank[often]), np.log(frequency[often]), 1)
    return float(-slope)
