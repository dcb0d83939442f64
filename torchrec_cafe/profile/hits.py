"""Predicted hit rates of caches of any size, from a histogram of stack distances."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torchrec_cafe.profile.distances import stack_distances
from torchrec_cafe.profile.sample import NEVER, SampledAccesses

#: Ways of a set of FBGEMM's cache.
FBGEMM_WAYS = 32

# Bins of distances for each doubling: 1.1 % wide.
_BINS_PER_OCTAVE = 64
_NUM_BINS = 48 * _BINS_PER_OCTAVE


class HitCurves:
    """Learns the stack distances of a trace, and says what caches would have held.

    Args:
        depth: batches that a look-ahead cache knows ahead, >= 0.
        seed: of where in its batch a row is, which decides ties of last use.

    Attributes:
        num_accesses: distinct rows of the batches, added up.
    """

    def __init__(self, depth: int, seed: int) -> None:
        """Nothing seen yet; see the class."""
        self._random = np.random.default_rng(seed)
        self._depth = depth
        self._distances = np.zeros(_NUM_BINS)
        self._ahead = np.zeros(_NUM_BINS)  # by the slots that hold the row of an access
        self._sampled = 0.0  # accesses, first uses among them
        self.num_accesses = 0

    def add(self, accesses: SampledAccesses, batch_rows: NDArray[np.int64], begin: int) -> None:
        """Learn a piece of the trace.

        Args:
            accesses: of its sampled ids.
            batch_rows: int64 ``[B]``, distinct rows of each batch of the piece, of all ids.
            begin: its first batch.
        """
        rate, end = accesses.rate, begin + len(batch_rows)
        distances = stack_distances(accesses, begin, end, self._random) / rate
        self._distances += _binned(distances) / rate
        again = accesses.previous != NEVER
        batches = accesses.batches[again] - begin
        gaps = batches + begin - accesses.previous[again]
        # Half of those a batch later: the old batch may be let go of before or after the new one
        # is announced.
        is_late = (gaps == self._depth + 1) & (self._random.random(len(gaps)) < 0.5)
        soon = np.flatnonzero((gaps <= self._depth) | is_late)
        at = gaps[soon], batches[soon]
        without, room = _room_for_waiting(batches, gaps, batch_rows, rate, self._depth + 1)
        # If there is room for some of the rows with as long a gap, any of them may have it.
        share = self._random.random(len(soon))
        needed = without[at] + share * (room[at] - without[at])
        slots = distances.copy()
        slots[soon] = np.minimum(distances[soon], needed)
        self._ahead += _binned(slots) / rate
        self._sampled += len(accesses.batches) / rate
        self.num_accesses += int(batch_rows.sum())

    def _histogram(
        self, weights: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows of the bins and the share of all accesses in them.

        What the sample has too few or too many of are rows so hot that they hit in every cache:
        the difference goes to the smallest distance (SHARDS-adj).
        """
        edges = 2 ** (np.arange(_NUM_BINS + 1) / _BINS_PER_OCTAVE) - 1
        weights = weights.copy()
        weights[0] += self.num_accesses - self._sampled
        return (edges[:-1] + edges[1:]) / 2, weights / max(1, self.num_accesses)

    def _below(
        self, weights: NDArray[np.float64], rows: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        needed, shares = self._histogram(weights)
        hits = np.append(0.0, np.cumsum(shares))
        return hits[np.searchsorted(needed, rows)].clip(0, 1)

    def look_ahead(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hit rates of a look-ahead cache: least recently used of the rows that nobody needs.

        With slots for the coming ``depth + 1`` batches it is the fully associative cache. With
        fewer, plans wait for slots, and rows that an announced batch needs stay although others
        were used later: those used again within ``depth`` batches, if there is room for them beside
        the batches in between and all others that are used again as soon.

        Args:
            rows: float64 ``[C]``, slots; at least the distinct rows of the largest batch.

        Returns:
            float64 ``[C]``, in [0, 1].
        """
        return self._below(self._ahead, rows)

    def set_associative(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hit rates of caches of 32-way sets, each of which evicts its least recently used row.

        Of ``d`` other rows, a Poisson number of mean ``32 d / rows`` lies in the set of a row,
        which is held if they are less than 32 (Smith, IEEE TSE 1978).

        Args:
            rows: float64 ``[C]``, of each cache, >= 32; whole sets are used.

        Returns:
            float64 ``[C]``, in [0, 1].
        """
        distances, weights = self._histogram(self._distances)
        used = weights != 0
        sets = np.maximum(rows // FBGEMM_WAYS, 1)
        held = poisson_below(FBGEMM_WAYS, distances[used] / sets[:, None])
        return (held @ weights[used]).clip(0, 1)


def _binned(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of them lie in each bin."""
    bins = (np.log2(rows + 1) * _BINS_PER_OCTAVE).astype(np.int64)
    return np.bincount(np.minimum(bins, _NUM_BINS - 1), minlength=_NUM_BINS)


def _room_for_waiting(
    batches: NDArray[np.int64],
    gaps: NDArray[np.int64],
    batch_rows: NDArray[np.int64],
    rate: float,
    longest: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slots that hold, beside each batch, all rows that are used again within some batches.

    Args:
        batches: int64 ``[A]``, of each access, from 0 for the piece's first.
        gaps: int64 ``[A]``, > 0, batches since the row's use before.
        batch_rows: int64 ``[B]``, distinct rows of each batch.
        rate: share of the ids that the accesses are of.
        longest: gap to look at, >= 1.

    Returns:
        Two float64 ``[longest + 1, B]``, by gap and batch of the later use: the most slots in use
        between the uses, by the batches and the rows that wait for a use after a shorter gap; and
        the same with those after as long a gap. What waited before the piece is left out.
    """
    size = len(batch_rows)
    used = batch_rows.astype(np.float64)
    without, room = np.zeros((longest + 1, size)), np.zeros((longest + 1, size))
    places = np.arange(size)
    for gap in range(2, longest + 1):
        # Rows wait in the batches between their uses: from -gap + 1 to -1.
        later = batches[gaps == gap]
        steps = np.bincount(np.maximum(later - gap + 1, 0), minlength=size + 1)
        steps = steps - np.bincount(later, minlength=size + 1)
        before, used = used, used + np.cumsum(steps)[:size] / rate
        for back in range(1, gap):
            between = np.maximum(places - back, 0)
            without[gap] = np.maximum(without[gap], before[between])
            room[gap] = np.maximum(room[gap], used[between])
    return without, room


def poisson_below(limit: int, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability that a Poisson number is below a limit.

    Args:
        limit: >= 1.
        mean: of the number, >= 0.
    """
    term = np.exp(-mean)
    total = term.copy()
    for k in range(1, limit):
        term *= mean / k
        total += term
    return total.clip(0, 1)
