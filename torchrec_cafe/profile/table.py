"""What is learned of one table from its part of the trace, piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_cafe.config import IdStatistics
from torchrec_cafe.profile.coverage import Frequencies, log_spaced, zipf_exponent
from torchrec_cafe.profile.hashing import BATCH_BITS, hash_keys
from torchrec_cafe.profile.head import SLOTS_PER_HOT_ID, HotIds
from torchrec_cafe.profile.hits import FBGEMM_WAYS, HitCurves
from torchrec_cafe.profile.sample import Runs, SpatialSample

# Bytes of a sampled id: hash, lookups, lookups of the day, last use; twice while some are inserted.
_SAMPLED_ID_BYTES = 2 * 4 * 8
_HOT_ID_BYTES = SLOTS_PER_HOT_ID * 16
_NUM_SKETCHES = 2  # of the trace, of the day
# Shares of a table's memory.
_SAMPLE_SHARE = 0.5
# Hottest ids of a day whose drift is measured, as a share of the ids.
_DRIFT_SHARE = 0.01
# Caches larger than this many times the distinct ids are all the same.
_LARGEST_CACHE = 4


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How traces are profiled.

    Attributes:
        batch_size: samples of a batch, >= 1.
        depth: batches that look-ahead tables know ahead, >= 0.
        table_bytes: memory of what is kept of a table, >= 2**16.
        seed: of the hashes, >= 0.
    """

    batch_size: int = 2048
    depth: int = 4
    table_bytes: int = 32 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: if one is out of range.
        """
        least = {"batch_size": 1, "depth": 0, "table_bytes": 1 << 16, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be >= {smallest}, got {getattr(self, name)}")

    @property
    def sampled_ids(self) -> int:
        """Ids of a table's sample."""
        return int(_SAMPLE_SHARE * self.table_bytes) // _SAMPLED_ID_BYTES

    @property
    def hot_ids(self) -> int:
        """Hottest ids of a table that are counted by a sketch."""
        return int((1 - _SAMPLE_SHARE) * self.table_bytes) // (_NUM_SKETCHES * _HOT_ID_BYTES)


class TableProfile:
    """Learns a table's ids; see docs/profile.md.

    Args:
        options: of the profile.

    Attributes:
        num_lookups: lookups so far.
        num_samples: samples so far.
        largest_id: the largest id so far, -1 before the first.
    """

    def __init__(self, options: TraceOptions) -> None:
        """Nothing seen yet; see the class."""
        self.options = options
        self.num_lookups = 0
        self.num_samples = 0
        self.largest_id = -1
        self._sample = SpatialSample(options.sampled_ids)
        self._curves = HitCurves(options.depth, options.seed)
        self._hot: HotIds | None = None  # while all ids are sampled nothing has to be estimated
        self._hot_today: HotIds | None = None
        self._largest_batch = 0
        self._days = 0
        self._drift_ids = 0
        self._yesterday = np.empty(0, dtype=np.uint64)
        self._drift = np.zeros(2)  # lookups of yesterday's hottest ids, and of today's

    def add(self, ids: NDArray[np.int64], batches: NDArray[np.uint64], samples: range) -> None:
        """Learn a piece of the trace, of whole batches.

        Args:
            ids: int64 ``[N]``, >= 0.
            batches: uint64 ``[N]``, number of the batch of each id, from 0 for the piece's first;
                less than 2**16.
            samples: numbers of the piece's samples.
        """
        size = self.options.batch_size
        begin, end = samples.start // size, -(-samples.stop // size)
        keys = hash_keys(ids, batches, self.options.seed)
        keys.sort()
        runs = _runs(keys, begin)
        accesses = self._sample.add(runs)
        batch_rows = np.bincount(runs.batches - begin, minlength=end - begin)
        self._curves.add(accesses, batch_rows, begin)
        self._count_hot(runs)
        self._sample.shrink()
        if len(ids):
            self.largest_id = max(self.largest_id, int(ids.max()))
            self._largest_batch = max(self._largest_batch, int(batch_rows.max()))
        self.num_lookups += len(ids)
        self.num_samples += len(samples)

    def _count_hot(self, runs: Runs) -> None:
        if self._hot is not None and self._hot_today is not None:
            hashes, lookups = _by_id(runs)
            self._hot.add(hashes, lookups)
            self._hot_today.add(hashes, lookups)
        elif self._sample.is_full:
            # The sample has counted all of them until now.
            self._hot = HotIds(self.options.hot_ids)
            self._hot.add(self._sample.hashes, self._sample.lookups)
            self._hot_today = HotIds(self.options.hot_ids)
            today = self._sample.today > 0
            self._hot_today.add(self._sample.hashes[today], self._sample.today[today])

    def end_day(self) -> None:
        """Note that the day is over: the next piece is of the next day."""
        if self._days == 0:
            share = math.ceil(_DRIFT_SHARE * self._sample.num_distinct)
            self._drift_ids = min(share, self.options.hot_ids)
        if self._hot_today is not None:
            hottest, lookups = self._hot_today.hottest(self._drift_ids)
            kept = self._hot_today.lookups_of(self._yesterday)
            self._hot_today = HotIds(self.options.hot_ids)
        else:
            counts = self._sample.today
            chosen = np.argsort(-counts, kind="stable")[: self._drift_ids]
            chosen = chosen[counts[chosen] > 0]
            hottest, lookups = self._sample.hashes[chosen], counts[chosen]
            kept = counts[np.isin(self._sample.hashes, self._yesterday)].sum()
        if self._days > 0:
            self._drift += float(kept), float(lookups.sum())
        self._yesterday = hottest
        self._days += 1
        self._sample.next_day()

    def _frequencies(self) -> Frequencies:
        sample = self._sample
        if self._hot is None:
            return Frequencies.exact(sample.lookups)
        hot, lookups = self._hot.hottest(self.options.hot_ids)
        others = sample.lookups[~np.isin(sample.hashes, hot, assume_unique=True)]
        return Frequencies.estimated(lookups, others, self.num_lookups, sample.num_distinct)

    def statistics(self) -> IdStatistics:
        """What was learned; :meth:`end_day` was called after the last piece.

        Raises:
            ValueError: if there were no lookups.
        """
        if self.num_lookups == 0:
            raise ValueError("there must be lookups, got none")
        coverage = self._frequencies().coverage()
        num_distinct = self._sample.num_distinct
        kept, total = self._drift
        largest = max(FBGEMM_WAYS, math.ceil(_LARGEST_CACHE * num_distinct))
        lru_rows = log_spaced(FBGEMM_WAYS, largest)
        slots = log_spaced(self._largest_batch, max(largest, self._largest_batch))
        return IdStatistics(
            num_lookups=self.num_lookups,
            num_distinct=num_distinct,
            bag_size=self.num_lookups / self.num_samples,
            batch_size=self.options.batch_size,
            zipf_exponent=zipf_exponent(coverage, self.num_lookups),
            drift_per_day=float(max(0.0, 1 - kept / total))
            if self._days > 1 and total
            else math.nan,
            drift_ids=self._drift_ids,
            coverage=coverage,
            lru_hits=_curve(lru_rows, self._curves.set_associative(lru_rows.astype(float))),
            lookahead_hits=_curve(slots, self._curves.look_ahead(slots.astype(float))),
        )


def _runs(keys: NDArray[np.uint64], begin: int) -> Runs:
    """The distinct pairs of id and batch of a piece, from its sorted keys."""
    new = np.ones(len(keys), dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    distinct = keys[starts]
    batches = (distinct & np.uint64((1 << BATCH_BITS) - 1)).astype(np.int64)
    lookups = np.diff(starts, append=len(keys))
    return Runs(distinct >> np.uint64(BATCH_BITS), batches + begin, lookups)


def _by_id(runs: Runs) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Each id of a piece once, with its lookups."""
    if len(runs.hashes) == 0:
        return runs.hashes, runs.lookups
    new = np.ones(len(runs.hashes), dtype=bool)
    np.not_equal(runs.hashes[1:], runs.hashes[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    return runs.hashes[starts], np.add.reduceat(runs.lookups, starts)


def _curve(rows: NDArray[np.int64], shares: NDArray[np.float64]) -> tuple[tuple[int, float], ...]:
    ascending = np.maximum.accumulate(shares)
    return tuple(zip(rows.tolist(), ascending.tolist(), strict=True))
