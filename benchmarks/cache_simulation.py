"""Caches as they are, batch by batch: FBGEMM's, and the slots of look-ahead tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from torchrec_cafe.ops import SlotMapState, announce_rows, plan_slots, release_slots

WAYS = 32

Batches = Sequence[NDArray[np.int64]]


def in_batches(ids: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """One id a sample, cut into batches."""
    return np.split(ids, range(batch_size, len(ids), batch_size))


def fbgemm_lru_hits(batches: Batches, rows: int) -> float:
    """Hit rate of FBGEMM's cache: 32-way sets by a hash, least recently used, time in batches.

    Hits of a batch are counted, and touched, before its misses are inserted. Those take the ways
    that were used longest ago, but none that the batch itself uses.
    """
    sets = max(1, rows // WAYS)
    keys = np.full((sets, WAYS), -1, dtype=np.int64)
    times = np.full((sets, WAYS), -1, dtype=np.int64)
    hits = total = 0
    for time, ids in enumerate(batches):
        distinct = np.unique(ids)
        at = _fmix64(distinct) % sets
        match = keys[at] == distinct[:, None]
        hit = match.any(1)
        times[at[hit], match.argmax(1)[hit]] = time
        hits, total = hits + np.count_nonzero(hit), total + len(distinct)
        order = np.argsort(at[~hit], kind="stable")
        missed, missed_at = distinct[~hit][order], at[~hit][order]
        used, starts, inverse = np.unique(missed_at, return_index=True, return_inverse=True)
        rank = np.arange(len(missed)) - starts[inverse]
        oldest = np.argsort(times[used], axis=1, kind="stable")
        way = oldest[inverse, np.minimum(rank, WAYS - 1)]
        fits = (rank < WAYS) & (times[missed_at, way] < time)
        keys[missed_at[fits], way[fits]] = missed[fits]
        times[missed_at[fits], way[fits]] = time
    return float(hits / total)


def _fmix64(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The finalizer of MurmurHash3, which spreads rows over sets."""
    keys = ids.astype(np.uint64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        keys ^= keys >> np.uint64(33)
        keys *= np.uint64(factor)
    keys ^= keys >> np.uint64(33)
    return (keys >> np.uint64(1)).astype(np.int64)


class _Planner:
    """The planning of ``tables/row_mover.py``, by the same operators, with no rows to move."""

    def __init__(self, slots: int) -> None:
        self.state = SlotMapState.empty(slots)
        self.waiting: deque[tuple[int, torch.Tensor]] = deque()
        self.planned: deque[tuple[int, torch.Tensor]] = deque()
        self.hits = self.total = 0

    def announce(self, number: int, ids: NDArray[np.int64]) -> None:
        self.state.make_room(len(ids))
        announced = announce_rows(torch.from_numpy(ids), self.state, number)
        self.waiting.append((number, announced.rows))
        self.plan_all()

    def plan_all(self) -> None:
        while self.waiting and self.plan(urgent=False):
            pass

    def plan(self, *, urgent: bool) -> bool:
        number, rows = self.waiting[0]
        oldest = self.planned[0][0] if self.planned else number
        plan = plan_slots(rows, self.state, oldest=oldest, urgent=urgent, train=True)
        if plan.shortage > 0:
            return False
        self.waiting.popleft()
        self.planned.append((number, plan.found))
        self.hits += len(rows) - len(plan.fill_rows)
        self.total += len(rows)
        return True


def slot_map_hits(batches: Batches, slots: int, depth: int) -> float | None:
    """Hit rate of look-ahead slots: rows that lie in one when their batch is planned.

    A batch is announced ``depth`` batches before it trains, and planned as soon as there are slots;
    the one that trains cannot wait. Its slots are let go of when it is done.

    Returns:
        The hit rate, or ``None`` if a batch has more distinct rows than there are slots.
    """
    planner = _Planner(slots)
    announced = 0
    for number in range(len(batches)):
        while announced < min(len(batches), number + depth + 1):
            planner.announce(announced, batches[announced])
            announced += 1
        if not planner.planned and not planner.plan(urgent=True):
            return None
        trained, held = planner.planned.popleft()
        assert trained == number
        release_slots(held, planner.state)
        planner.plan_all()
    return planner.hits / planner.total
