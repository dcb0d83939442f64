"""The most frequent ids of a stream, by our own HotSketch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from torchrec_cafe.ops import FREE, SLOTS, SketchState, observe

#: Slots for each id whose count is to be relied on.
SLOTS_PER_HOT_ID = 8


class HotIds:
    """Counts the most frequent ids; importance is a lookup.

    A count never exceeds the true one, but for float32's rounding (2**-24 of it per piece), and is
    short of it by the lookups before the id got its slot for good.

    Args:
        capacity: ids whose counts are to be relied on, >= 1; each takes 8 slots of 16 bytes.
    """

    def __init__(self, capacity: int) -> None:
        """An empty sketch; see the class."""
        buckets = max(1, capacity * SLOTS_PER_HOT_ID // SLOTS)
        self._state = SketchState.empty(shards=1, buckets=buckets, hot_rows=1)

    def add(self, hashes: NDArray[np.uint64], lookups: NDArray[np.int64]) -> None:
        """Count lookups.

        Args:
            hashes: uint64 ``[N]``, of the ids, each once.
            lookups: int64 ``[N]``, > 0, of each.
        """
        observe(
            self._state,
            torch.from_numpy(hashes.view(np.int64)),
            torch.zeros(len(hashes), dtype=torch.int32),
            torch.from_numpy(lookups.astype(np.float32)),
        )

    def hottest(self, size: int) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        """The most frequent ids.

        Args:
            size: how many, at most.

        Returns:
            Hashes uint64 ``[n]`` and lookups float64 ``[n]``, in no order.
        """
        hashes, lookups = self._held()
        if len(hashes) <= size:
            return hashes, lookups
        chosen = np.argpartition(lookups, len(hashes) - size)[-size:]
        return hashes[chosen], lookups[chosen]

    def lookups_of(self, hashes: NDArray[np.uint64]) -> float:
        """Lookups of some ids, added up; those without a slot have none.

        Args:
            hashes: uint64 ``[n]``, each once.
        """
        held, lookups = self._held()
        return float(lookups[np.isin(held, hashes)].sum())

    def _held(self) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        used = (self._state.hot_rows != FREE).flatten()
        hashes = self._state.keys.flatten()[used].numpy().view(np.uint64)
        return hashes, self._state.scores.flatten()[used].double().numpy()
