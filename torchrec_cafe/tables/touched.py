"""Which rows have changed since when."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_cafe.ops import ACTION_KEEP, FREE, MEDIUM, SLOTS, Moves, PoolRows


class TouchedRows:
    """The version in which each row was last touched.

    Args:
        num_rows: rows, >= 0.
        device: where they live.

    Attributes:
        version: of what is touched from now on; the first is 1.
        stamps: int32 ``[num_rows]``, 0 for a row that was never touched.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        """None is touched yet; see the class."""
        self.version = 1
        self.stamps = torch.zeros(num_rows, dtype=torch.int32, device=device)

    def mark(self, rows: Tensor) -> None:
        """Note rows.

        Args:
            rows: int64 ``[N]``, in [0, num_rows), may repeat.
        """
        self.stamps.index_fill_(0, rows, self.version)

    def mark_moved(self, moves: Moves, pool: PoolRows) -> None:
        """Note the hot rows that have changed hands; without waiting for the device.

        Args:
            moves: as given to :func:`torchrec_cafe.ops.move_rows`.
            pool: where the rows lie; nothing lies after them.
        """
        by_shard = self.stamps[pool.offset :].view(-1, pool.rows_per_shard)
        old = by_shard[moves.selected, : pool.hot_rows_per_shard]
        new = torch.where(moves.actions == ACTION_KEEP, old, self.version)
        by_shard[moves.selected, : pool.hot_rows_per_shard] = new.int()

    def since(self, version: int) -> Tensor:
        """Rows that were touched after a version, int64 ``[n]``, ascending."""
        return (self.stamps > version).nonzero().squeeze(1)


def of_lookups(buckets: Tensor) -> Tensor:
    """What lookups read of a sketch: keys that own a row or are medium, without scores.

    Args:
        buckets: int64 ``[S, W, 8]``, of a sketch.

    Returns:
        int64 ``[S, W, 8]``; all other slots are free, their key and score 0.
    """
    result = torch.zeros_like(buckets)
    slots = buckets.view(torch.int32)[..., 3 * SLOTS :]
    read = (slots >= 0) | (slots == MEDIUM)
    result[..., :SLOTS] = torch.where(read, buckets[..., :SLOTS], 0)
    result.view(torch.int32)[..., 3 * SLOTS :] = torch.where(read, slots, FREE)
    return result


def hot_keys(buckets: Tensor) -> Tensor:
    """The keys of a sketch that own a row, int64 ``[n]``, ascending.

    Args:
        buckets: int64 ``[S, W, 8]``.
    """
    hot = buckets.view(torch.int32)[..., 3 * SLOTS :] >= 0
    return buckets[..., :SLOTS][hot].sort().values


class TouchedBuckets:
    """The version in which what lookups read of each bucket has last changed.

    Args:
        buckets: int64 ``[S, W, 8]``, of a sketch that is to be followed.

    Attributes:
        known: int64 ``[S, W, 8]``, what lookups read of it when a version last ended.
        stamps: int32 ``[S * W]``.
    """

    def __init__(self, buckets: Tensor) -> None:
        """Nothing has changed yet; see the class."""
        self.known = of_lookups(buckets)
        self.stamps = torch.zeros(
            self.known.shape[:2].numel(), dtype=torch.int32, device=buckets.device
        )
        self._changes: list[tuple[int, Tensor, Tensor]] = []

    def update(self, buckets: Tensor, version: int) -> None:
        """Compare with what was there before.

        Args:
            buckets: of the sketch, now.
            version: that the changes belong to.
        """
        now = of_lookups(buckets)
        changed = (now != self.known).flatten(0, 1).any(1)
        self.stamps[changed] = version
        before, after = hot_keys(self.known), hot_keys(now)
        became, stopped = after[~torch.isin(after, before)], before[~torch.isin(before, after)]
        if became.numel() or stopped.numel():
            self._changes.append((version, became, stopped))
        self.known = now

    def since(self, version: int) -> Tensor:
        """Buckets that have changed after a version, int64 ``[n]``, ascending."""
        return (self.stamps > version).nonzero().squeeze(1)

    def hot_since(self, version: int) -> tuple[Tensor, Tensor]:
        """Keys that have become hot after a version, and those that have stopped being it."""
        none = self.known.new_empty(0)
        changes = [change for change in self._changes if change[0] > version]
        became = torch.cat([none, *(change[1] for change in changes)])
        stopped = torch.cat([none, *(change[2] for change in changes)])
        keys, which = torch.cat([became, stopped]).unique(return_inverse=True)
        signs = torch.ones_like(which)
        signs[len(became) :] = -1
        net = torch.zeros_like(keys).index_add_(0, which, signs)
        return keys[net > 0], keys[net < 0]
