"""How many rows a cache sees between two uses of a row: LRU stack distances, a batch at a time.

An access is a distinct row of a batch. Its distance is the number of other rows used since its own
last use, up to the moment that its batch is planned: before that batch brings rows in. A cache of
C rows that evicts the least recently used row holds it if the distance is below C (Mattson et al.,
1970).

Shape legend: A accesses of sampled ids, P places (batches of last uses).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torchrec_cafe.profile.sample import NEVER, SampledAccesses

# Groups that last uses before the piece are counted in; between two of them it is linear. Those
# within the piece are counted batch by batch.
_GROUPS = 128
# Batches since the oldest last use for which there is an array.
_DENSE = 1 << 20


def stack_distances(
    accesses: SampledAccesses, begin: int, end: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Distance of each access whose row was used before, in sampled rows.

    Of a row last used in batch p and now in batch b, the distance is the number of accesses of
    batches between the two whose own last use is not after p, and of the rows of batch p that come
    later in it. Within its batch a row is as likely to come early as late.

    Args:
        accesses: of the piece.
        begin: first batch of the piece.
        end: the batch after its last.
        random: where in its batch a row is.

    Returns:
        float64 ``[A']``, >= 0, of those with ``previous`` other than ``NEVER``, in their order.
    """
    again = accesses.previous != NEVER
    if not again.any():
        return np.empty(0)
    previous, time = accesses.previous[again], accesses.batches[again] - begin
    uses = _LastUses(accesses, begin, end)
    at = uses.places(previous)
    late = random.random(len(previous))
    passed_late = uses.passed(uses.places(previous - 1), time)
    passed_early = uses.passed(at, time)
    others = late * (uses.same[at] - 1 + passed_late) + (1 - late) * passed_early
    return np.maximum(uses.later[at] + others, 0.0)


class _LastUses:
    """The rows of a piece by the batch of their last use: all that depends on that batch alone.

    Attributes:
        same: int64 ``[P]``, by place: rows last used in the batch, when the piece begins; of the
            piece's own batches, their rows.
        later: int64 ``[P]``: rows last used later, when the piece begins; of the piece's own
            batches, minus the rows of the piece up to the batch.
    """

    def __init__(self, accesses: SampledAccesses, begin: int, end: int) -> None:
        before, size = accesses.before, end - begin
        known = before[np.searchsorted(before, NEVER, side="right") :]
        first = int(known[0]) if len(known) else begin
        # Places are batches from the one before the first use on, or, if those are too many, last
        # uses alone.
        self._batches = (
            np.arange(first - 1, end)
            if end - first <= _DENSE
            else np.unique(np.concatenate([known, known - 1, np.arange(begin - 1, end)]))
        )
        place_of_begin = len(self._batches) - size
        upto = np.searchsorted(before, self._batches, side="right")
        self.same = np.diff(upto, prepend=len(before) - len(known))
        self.later = len(before) - upto
        sizes = np.bincount(accesses.batches - begin, minlength=size)
        self.same[place_of_begin:] = sizes
        self.later[place_of_begin:] = -np.cumsum(sizes)
        self._group(known, begin, end)
        group = np.where(accesses.previous == NEVER, 0, self._upper[self.places(accesses.previous)])
        counts = np.bincount(
            group * size + (accesses.batches - begin), minlength=self._num_groups * size
        )
        # Accesses up to each group, before each batch.
        self._grid = np.zeros((self._num_groups, size + 1), dtype=np.int32)
        np.cumsum(counts.reshape(-1, size).cumsum(0), axis=1, out=self._grid[:, 1:])

    def _group(self, known: NDArray[np.int64], begin: int, end: int) -> None:
        """Find the groups below and above each place, and how far it is between them."""
        older = known[np.flatnonzero(np.diff(known, prepend=NEVER))]
        is_exact = len(older) <= _GROUPS
        if not is_exact:
            older = known[np.linspace(0, len(known) - 1, _GROUPS).astype(np.int64)]
        edges = np.unique(np.concatenate([self._batches[:1], older, np.arange(begin, end)]))
        self._num_groups = len(edges)
        self._upper = np.searchsorted(edges, self._batches)
        self._lower = np.maximum(self._upper - 1, 0)
        width = np.maximum(edges[self._upper] - edges[self._lower], 1)
        share = (self._batches - edges[self._lower]) / width
        # No row was last used between two batches that both have a group.
        self._share = (np.floor(share) if is_exact else share).astype(np.float32)

    def places(self, batches: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the arrays have batches; those of no use at all come first."""
        if self._batches[-1] - self._batches[0] + 1 == len(self._batches):
            return np.maximum(batches - self._batches[0], 0)
        return np.searchsorted(self._batches, batches)

    def passed(self, at: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.float64]:
        """Accesses of the first ``time`` batches of the piece, last used at most at a place."""
        grid, width = self._grid.reshape(-1), self._grid.shape[1]
        below = grid[self._lower[at] * width + time]
        above = grid[self._upper[at] * width + time]
        return below + self._share[at].astype(np.float64) * (above - below)
