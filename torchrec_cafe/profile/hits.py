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
        self._weights = np.zeros(_NUM_BINS)
        self._gaps = np.zeros(depth + 2)  # by batches since the last use, 0 unused
        self._sampled = 0.0  # accesses, first uses among them
        self._num_batches = 0
        self.num_accesses = 0

    def add(self, accesses: SampledAccesses, num_accesses: int, begin: int, end: int) -> None:
        """Learn a piece of the trace.

        Args:
            accesses: of its sampled ids.
            num_accesses: of all ids: distinct rows of the batches, added up.
            begin: its first batch.
            end: the batch after its last.
        """
        rows = stack_distances(accesses, begin, end, self._random) / accesses.rate
        bins = (np.log2(rows + 1) * _BINS_PER_OCTAVE).astype(np.int64)
        counts = np.bincount(np.minimum(bins, _NUM_BINS - 1), minlength=_NUM_BINS)
        self._weights += counts / accesses.rate
        gaps = (accesses.batches - accesses.previous)[accesses.previous != NEVER]
        gaps = gaps[gaps < len(self._gaps)]
        self._gaps += np.bincount(gaps, minlength=len(self._gaps)) / accesses.rate
        self._sampled += len(accesses.batches) / accesses.rate
        self._num_batches += end - begin
        self.num_accesses += num_accesses

    def _histogram(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Distances and the share of all accesses that have them.

        What the sample has too few or too many of are rows so hot that they hit in every cache:
        the difference goes to the smallest distance (SHARDS-adj).
        """
        edges = 2 ** (np.arange(_NUM_BINS + 1) / _BINS_PER_OCTAVE) - 1
        weights = self._weights.copy()
        weights[0] += self.num_accesses - self._sampled
        return (edges[:-1] + edges[1:]) / 2, weights / max(1, self.num_accesses)

    def fully_associative(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hit rates of caches that evict the least recently used of all rows.

        Args:
            rows: float64 ``[C]``, of each cache, >= 1.

        Returns:
            float64 ``[C]``, in [0, 1].
        """
        distances, weights = self._histogram()
        hits = np.append(0.0, np.cumsum(weights))
        return hits[np.searchsorted(distances, rows)].clip(0, 1)

    def look_ahead(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hit rates of a look-ahead cache: least recently used of the rows that nobody needs.

        With slots for the coming ``depth + 1`` batches it is the fully associative cache. With
        fewer, plans wait for slots, and rows that an announced batch needs stay although others
        were used later. Those are the rows used again within ``depth`` batches (and half of those
        in the batch after: the older batch is let go of before or after the new one is announced),
        or within fewer if there is no room for them: rows used again t batches later take slots for
        t - 1 batches that do not need them (Little's law).

        Args:
            rows: float64 ``[C]``, slots; at least the distinct rows of the largest batch.

        Returns:
            float64 ``[C]``, in [0, 1].
        """
        shares = self._gaps / max(1, self.num_accesses)
        if len(shares) > 1:
            # Too few or too many sampled rows: of those so hot that all batches have them.
            shares[1] += 1 - self._sampled / max(1, self.num_accesses)
        batches = rows * self._num_batches / max(1, self.num_accesses)
        gaps = np.arange(len(shares))
        reserved = np.cumsum(shares * np.maximum(gaps - 1, 0))
        held = np.cumsum(shares)
        depth = len(shares) - 2
        window = np.interp(batches - 1, reserved, gaps)
        needed_soon = np.interp(np.minimum(window, depth + 0.5), gaps, held)
        return np.maximum(self.fully_associative(rows), needed_soon).clip(0, 1)

    def set_associative(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hit rates of caches of 32-way sets, each of which evicts its least recently used row.

        Of ``d`` other rows, a Poisson number of mean ``32 d / rows`` lies in the set of a row,
        which is held if they are less than 32 (Smith, IEEE TSE 1978).

        Args:
            rows: float64 ``[C]``, of each cache, >= 32; whole sets are used.

        Returns:
            float64 ``[C]``, in [0, 1].
        """
        distances, weights = self._histogram()
        used = weights != 0
        sets = np.maximum(rows // FBGEMM_WAYS, 1)
        held = poisson_below(FBGEMM_WAYS, distances[used] / sets[:, None])
        return (held @ weights[used]).clip(0, 1)


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
