"""A sample of ids by their hashes, with all that was seen of each (SHARDS, FAST 2015).

Shape legend: M sampled ids, R runs, one for each pair of id and batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_cafe.profile.hashing import HASH_RANGE

#: Batch of the last use of an id that has not been used.
NEVER = -1


class Runs(NamedTuple):
    """The accesses of a piece of the trace: the distinct rows of its batches.

    Attributes:
        hashes: uint64 ``[R]``, ascending.
        batches: int64 ``[R]``, ascending where hashes are equal.
        lookups: int64 ``[R]``, > 0, of the id in the batch.
    """

    hashes: NDArray[np.uint64]
    batches: NDArray[np.int64]
    lookups: NDArray[np.int64]


@dataclass(frozen=True)
class SampledAccesses:
    """What the accesses of the sampled ids of a piece are to those before.

    Attributes:
        batches: int64 ``[R]``, of each access.
        previous: int64 ``[R]``, batch of the id's access before, or :data:`NEVER`.
        before: int64 ``[M]``, ascending: last uses of the sampled ids before the piece.
        after: int64 ``[M']``, ascending: the same after it, ids of the piece among them.
        rate: share of all ids that were sampled, in (0, 1].
    """

    batches: NDArray[np.int64]
    previous: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    rate: float


class SpatialSample:
    """The ids with the lowest hashes, as many as there is room for.

    Whether an id is in it depends on nothing but its hash, and from its first lookup on: an id that
    is still there has been there all the time, so that its counts are exact. Ids leave as others
    come, and never come back. It is a bottom-k (KMV) sketch of the distinct ids, too.

    Args:
        capacity: most ids, >= 16.

    Attributes:
        hashes: uint64 ``[M]``, ascending.
        lookups: int64 ``[M]``, of each id, since the beginning.
        today: int64 ``[M]``, the same since :meth:`next_day`.
        threshold: ids are sampled if their hashes are below it, in (0, 2**48].

    Reference: Waldspurger et al., Efficient MRC Construction with SHARDS, FAST 2015, fixed-size
    SHARDS; distinct ids: Bar-Yossef et al., RANDOM 2002, and Beyer et al., SIGMOD 2007.
    """

    def __init__(self, capacity: int) -> None:
        """An empty sample; see the class."""
        self._capacity = capacity
        self.threshold = HASH_RANGE
        self.hashes = np.empty(0, dtype=np.uint64)
        self.lookups = np.empty(0, dtype=np.int64)
        self.today = np.empty(0, dtype=np.int64)
        self._last = np.empty(0, dtype=np.int64)

    @property
    def rate(self) -> float:
        """Share of all ids that are sampled, in (0, 1]; 1: all are, and everything is exact."""
        return self.threshold / HASH_RANGE

    @property
    def is_full(self) -> bool:
        """Whether there are more ids than there is room for, until :meth:`shrink`."""
        return len(self.hashes) > self._capacity

    @property
    def num_distinct(self) -> float:
        """Estimate of the number of distinct ids; exact while all are sampled.

        Its relative standard error is at most ``1 / sqrt(capacity - 2)``.
        """
        return len(self.hashes) / self.rate

    def add(self, runs: Runs) -> SampledAccesses:
        """Count the accesses of a piece.

        Args:
            runs: of all ids of the piece.

        Returns:
            The accesses of the sampled ids, in the order of ``runs``.
        """
        end = np.searchsorted(runs.hashes, np.uint64(self.threshold))
        hashes, batches, lookups = runs.hashes[:end], runs.batches[:end], runs.lookups[:end]
        before = np.sort(self._last)
        first = np.ones(len(hashes), dtype=bool)
        np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
        starts = np.flatnonzero(first)
        at = self._find_or_insert(hashes[starts])
        previous = np.empty(len(hashes), dtype=np.int64)
        previous[1:] = batches[:-1]
        previous[starts] = self._last[at]
        if len(starts):
            sums = np.add.reduceat(lookups, starts)
            self.lookups[at] += sums
            self.today[at] += sums
            self._last[at] = batches[np.append(starts[1:], len(hashes)) - 1]
        return SampledAccesses(batches, previous, before, np.sort(self._last), self.rate)

    def _find_or_insert(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Places of ids, ascending and distinct; those that are new get one."""
        at = np.searchsorted(self.hashes, hashes)
        known = np.zeros(len(hashes), dtype=bool)
        inside = at < len(self.hashes)
        known[inside] = self.hashes[at[inside]] == hashes[inside]
        new = ~known
        where = at[new]
        self.hashes = np.insert(self.hashes, where, hashes[new])
        self.lookups = np.insert(self.lookups, where, 0)
        self.today = np.insert(self.today, where, 0)
        self._last = np.insert(self._last, where, NEVER)
        # Each place moves up by the new ids that come before it.
        return at + np.cumsum(new) - new

    def shrink(self) -> None:
        """Let the ids with the highest hashes go until there is room for the others."""
        if not self.is_full:
            return
        self.threshold = int(self.hashes[self._capacity])
        for name in ("hashes", "lookups", "today", "_last"):
            setattr(self, name, getattr(self, name)[: self._capacity].copy())

    def next_day(self) -> None:
        """Begin to count :attr:`today` anew."""
        self.today[:] = 0
