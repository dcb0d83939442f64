"""Hashing, the sketch, and the rows of CAFE and of the quotient-remainder trick."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from torchrec_cafe.ops.hot_sketch import (
    ACTION_ADD,
    ACTION_CLEAR,
    ACTION_COPY,
    ACTION_KEEP,
    COLD,
    COUNTERS,
    FREE,
    MEDIUM,
    NO_OWNER,
    SLOTS,
    WEAR,
    SketchState,
)
from torchrec_cafe.ops.pool_rows import Lookups, Moves
from torchrec_cafe.ops.row_map import HotRows, PoolRows, Remapped

_WORD = 2**64
INFLATION_LIMIT = 2.0**60
MAX_SCORE = 2.0**90
NORM_BLOCK = 256


def hash64(x: int) -> int:
    """MurmurHash3's 64-bit finaliser."""
    x %= _WORD
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD % _WORD
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 % _WORD
    return x ^ x >> 33


def mix_id(id_: int, n: int) -> int:
    """A bijection of ``[0, n)``; see ``csrc/hash.h``."""
    bits = max(0, n - 1).bit_length()
    if bits < 2:
        return id_
    mask, shift = (1 << bits) - 1, (bits + 1) // 2
    while True:
        id_ ^= id_ >> shift
        id_ = (id_ * 0xFF51AFD7ED558CCD + 0x9E3779B97F4A7C15) & mask
        id_ ^= id_ >> shift
        id_ = (id_ * 0xC4CEB9FE1A85EC53 + 0xBF58476D1CE4E5B9) & mask
        id_ ^= id_ >> shift
        id_ = id_ * 0x94D049BB133111EB & mask
        id_ ^= id_ >> shift
        if id_ < n:
            return id_


def mix_ids(
    ids: Tensor, feature_offsets: Tensor, num_embeddings: Tensor, out_of_range: Tensor
) -> Tensor:
    """See :func:`torchrec_cafe.ops.mix_ids`."""
    mixed = ids.clone()
    offsets = feature_offsets.tolist()
    for feature, n in enumerate(num_embeddings.tolist()):
        for i in range(offsets[feature], offsets[feature + 1]):
            if n == 0:
                continue
            valid = 0 <= int(ids[i]) < n
            out_of_range[feature] += not valid
            mixed[i] = mix_id(int(ids[i]) if valid else 0, n)
    return mixed


def bucket_of(key: int, num_buckets: int) -> int:
    """The bucket of a key."""
    return (hash64(key) >> 32) * num_buckets >> 32


def find(buckets: Tensor, shard: int, key: int) -> tuple[int, int] | None:
    """Bucket and slot that hold a key."""
    bucket = bucket_of(key, buckets.shape[1])
    hot_rows = buckets[shard, bucket].view(torch.int32)[3 * SLOTS :].tolist()
    for slot, held in enumerate(buckets[shard, bucket, :SLOTS].tolist()):
        if held == key and hot_rows[slot] != FREE:
            return bucket, slot
    return None


def remap(
    ids: Tensor, offsets: Tensor, tables: Tensor, hot: HotRows, *, with_source: bool = True
) -> Remapped:
    """See :func:`torchrec_cafe.ops.remap`."""
    features = tables.shape[0]
    batch_size = (offsets.numel() - 1) // features
    rows, out_offsets, source, second = [], [0], [], []
    keys, shards, cold_shards = [0] * ids.numel(), [-1] * ids.numel(), [-1] * ids.numel()
    pool = hot.rows
    for sample in range(batch_size):
        for feature in range(features):
            num_ids, shared_rows, first_id, row_offset, index, *_ = tables[feature].tolist()
            bag = feature * batch_size + sample
            for i in range(int(offsets[bag]), int(offsets[bag + 1])):
                mixed_id = first_id + int(ids[i])
                shared_row = mixed_id * shared_rows // num_ids
                row, other = row_offset + shared_row, -1
                if index >= 0 and hot.num_shards > 0:
                    keys[i] = index << 48 | mixed_id
                    shard = shared_row * hot.num_shards // shared_rows - hot.first_shard
                    if 0 <= shard < hot.buckets.shape[0]:
                        shards[i] = shard
                        place = find(hot.buckets, shard, keys[i])
                        hot_row = COLD
                        if place is not None:
                            slots = hot.buckets.view(torch.int32)[shard, place[0], 3 * SLOTS :]
                            hot_row = int(slots[place[1]])
                        cold_shards[i] = -1 if hot_row >= 0 else shard
                        if hot_row >= 0:
                            row = pool.offset + shard * pool.rows_per_shard + hot_row
                        if hot_row == MEDIUM:
                            at = second_row(keys[i], pool.second_rows_per_shard)
                            other = shard * pool.rows_per_shard + pool.hot_rows_per_shard + at
                rows.append(row)
                second.append(other)
                source.append(i)
            out_offsets.append(len(rows))
    known = ids.numel() if hot.num_shards > 0 else 0
    return Remapped(
        rows=torch.tensor(rows, dtype=torch.int64),
        offsets=torch.tensor(out_offsets, dtype=torch.int64),
        source=torch.tensor(source if with_source else [], dtype=torch.int32),
        keys=torch.tensor(keys[:known], dtype=torch.int64),
        shards=torch.tensor(shards[:known], dtype=torch.int32),
        second=torch.tensor(
            second[: known if pool.second_rows_per_shard else 0], dtype=torch.int32
        ),
        cold_shards=torch.tensor(cold_shards[: known if with_source else 0], dtype=torch.int32),
    )


def insert(state: SketchState, shard: int, key: int, score: float) -> str:
    """Add a score to a key: ``hit``, ``inserted``, ``worn``, ``replaced`` or ``skipped``."""
    bucket = bucket_of(key, state.buckets.shape[1])
    keys, scores = state.keys[shard, bucket], state.scores[shard, bucket]
    hot_rows = state.hot_rows[shard, bucket]
    added = torch.tensor(score, dtype=torch.float32)
    place = find(state.buckets, shard, key)
    if place is not None:
        scores[place[1]] += added
        return "hit"
    free = (hot_rows == FREE).nonzero().flatten()
    if free.numel():
        keys[free[0]], scores[free[0]], hot_rows[free[0]] = key, added, COLD
        return "inserted"
    cold = ((hot_rows == COLD) | (hot_rows == MEDIUM)).nonzero().flatten()
    if not cold.numel():
        return "skipped"
    weakest = min(cold.tolist(), key=lambda slot: (float(scores[slot]), slot))
    left = scores[weakest] - WEAR * added
    if left >= 0:
        scores[weakest] = left
        return "worn"
    keys[weakest], scores[weakest], hot_rows[weakest] = key, added, COLD
    return "replaced"


def observe(
    state: SketchState, keys: Tensor, shards: Tensor, importance: Tensor, *, growth: float = 1.0
) -> None:
    """See :func:`torchrec_cafe.ops.observe`."""
    state.inflation.mul_(growth)
    over = state.inflation > INFLATION_LIMIT
    state.inflation[over] /= INFLATION_LIMIT
    state.scores[over] /= INFLATION_LIMIT
    for shard, key, x in zip(shards.tolist(), keys.tolist(), importance.tolist(), strict=True):
        if shard < 0:
            continue
        if not (math.isfinite(x) and x >= 0):
            outcome = "non_finite"
        else:
            score = min(x * float(state.inflation[shard]), MAX_SCORE)
            outcome = insert(state, shard, key, score)
        if outcome in COUNTERS:
            state.counters[shard, COUNTERS.index(outcome)] += 1
    state.steps.add_(1)


def rebalance(
    state: SketchState,
    selected: Tensor,
    *,
    min_score: float = 0.0,
    hysteresis: float = 0.0,
    num_medium: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`torchrec_cafe.ops.rebalance`."""
    num_hot_rows = state.owners.shape[1]
    actions = torch.zeros((selected.numel(), num_hot_rows), dtype=torch.int8)
    new_keys = torch.zeros((selected.numel(), num_hot_rows), dtype=torch.int64)
    for i, shard in enumerate(selected.tolist()):
        keys, scores = state.keys[shard].flatten(), state.scores[shard].flatten()
        hot_rows, owners = state.hot_rows[shard].flatten(), state.owners[shard]
        floor = torch.tensor(min_score * float(state.inflation[shard]), dtype=torch.float32)
        held = scores[hot_rows != FREE]
        threshold = floor
        if held.numel() > num_hot_rows:
            threshold = torch.maximum(floor, held.sort(descending=True).values[num_hot_rows - 1])
        keep = threshold * (1 - torch.tensor(hysteresis, dtype=torch.float32))
        for row, slot in enumerate(owners.tolist()):
            if slot != NO_OWNER and scores[slot] < keep:
                hot_rows[slot], owners[row], actions[i, row] = COLD, NO_OWNER, ACTION_CLEAR
                state.counters[shard, COUNTERS.index("demoted")] += 1
        free = (owners == NO_OWNER).nonzero().flatten().tolist()
        rowless = (hot_rows == COLD) | (hot_rows == MEDIUM)
        eligible = (rowless & (scores >= threshold)).nonzero().flatten().tolist()
        best = sorted(eligible, key=lambda slot: (-float(scores[slot]), slot))[: len(free)]
        for row, slot in zip(free, sorted(best), strict=False):
            actions[i, row] = ACTION_ADD if hot_rows[slot] == MEDIUM else ACTION_COPY
            hot_rows[slot], owners[row], new_keys[i, row] = row, slot, keys[slot]
            state.counters[shard, COUNTERS.index("promoted")] += 1
        if num_medium > 0:
            rank, held = num_hot_rows + num_medium, scores[hot_rows != FREE]
            least = torch.zeros(())
            if held.numel() > rank:
                least = held.sort(descending=True).values[rank - 1]
            keep = least * (1 - torch.tensor(hysteresis, dtype=torch.float32))
            stays = (hot_rows == MEDIUM) & (scores >= keep)
            becomes = (hot_rows == COLD) & (scores >= least)
            rowless = (hot_rows == COLD) | (hot_rows == MEDIUM)
            hot_rows[rowless & (stays | becomes)] = MEDIUM
            hot_rows[rowless & ~(stays | becomes)] = COLD
        state.hot_rows[shard] = hot_rows.view(-1, SLOTS)
    return actions, new_keys


def l2_norms(grad: Tensor) -> Tensor:
    """Norms of the rows: squares in double precision, added in a fixed order."""
    sums = torch.zeros((len(grad), 4), dtype=torch.float64)
    for lanes in grad.double().split(4, dim=1):
        sums += lanes * lanes
    return ((sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3])).sqrt().float()


def learn(  # noqa: PLR0913  as many as torchrec_cafe.ops.learn
    state: SketchState,
    norms: Tensor,
    grad: Tensor,
    offsets: Tensor,
    batch: Remapped,
    *,
    features: Tensor,
    weights: Tensor | None = None,
    decay: float = 1.0,
    growth: float = 1.0,
) -> None:
    """See :func:`torchrec_cafe.ops.learn`."""
    if norms.shape[0] == 0:
        return
    bag_norms = l2_norms(grad).view(-1, features.numel())
    seen = torch.zeros(norms.shape[1:], dtype=torch.float64)
    for feature, table in enumerate(features.tolist()):
        if table < 0:
            continue
        total = torch.zeros(2, dtype=torch.float64)
        for block in bag_norms[:, feature].split(NORM_BLOCK):
            part = torch.zeros(2, dtype=torch.float64)
            for norm in block[block.isfinite()].double():
                part += torch.stack([norm, torch.ones((), dtype=torch.float64)])
            total += part
        seen[table] += total
    running = norms[0] * decay + seen
    norms.copy_(running.expand_as(norms))
    scales = torch.where(running[:, 0] > 0, running[:, 1] / running[:, 0], 0.0).float()
    scale = torch.where(features >= 0, scales[features.clamp(min=0)], 0.0)
    by_bag = (bag_norms * scale).t().flatten()
    importance = by_bag.repeat_interleave(offsets.diff())
    if weights is not None:
        importance = importance * weights.abs()
    tracked = (features >= 0).repeat_interleave(len(bag_norms)).repeat_interleave(offsets.diff())
    observe(state, batch.keys, torch.where(tracked, batch.shards, -1), importance, growth=growth)


def second_row(key: int, num_rows: int) -> int:
    """Which second row of its shard a medium key looks up."""
    return (hash64(key) & 0xFFFFFFFF) * num_rows >> 32


def move_rows(
    rows: Tensor, moves: Moves, tables: Tensor, pool: PoolRows, *, second_factor: float
) -> None:
    """See :func:`torchrec_cafe.ops.move_rows`."""
    for i, shard in enumerate(moves.selected.tolist()):
        first = pool.offset + shard * pool.rows_per_shard
        for row, action in enumerate(moves.actions[i].tolist()):
            if action == ACTION_CLEAR:
                rows[first + row] = 0
            if action in (ACTION_KEEP, ACTION_CLEAR):
                continue
            key = int(moves.new_keys[i, row])
            num_ids, shared_rows, _, row_offset, *_ = tables[key >> 48].tolist()
            shared = rows[row_offset + (key & (1 << 48) - 1) * shared_rows // num_ids]
            if action == ACTION_COPY:
                rows[first + row] = shared
            else:
                at = first + pool.hot_rows_per_shard + second_row(key, pool.second_rows_per_shard)
                rows[first + row] = (second_factor * (shared.float() + rows[at].float())).to(
                    rows.dtype
                )


def add_second_rows(batch: Remapped, pool: PoolRows) -> Lookups:
    """See :func:`torchrec_cafe.ops.add_second_rows`."""
    rows, offsets, source = [], [0], []
    for begin, end in itertools.pairwise(batch.offsets.tolist()):
        for i in range(begin, end):
            second = int(batch.second[i])
            found = [int(batch.rows[i]), *([pool.offset + second] if second >= 0 else [])]
            rows += found
            source += batch.source[i : i + 1].tolist() * len(found)
        offsets.append(len(rows))
    return Lookups(
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(source, dtype=torch.int32),
    )


def quotient_remainder(ids: Tensor, offsets: Tensor, tables: Tensor) -> Lookups:
    """See :func:`torchrec_cafe.ops.quotient_remainder`."""
    features = tables.shape[0]
    batch_size = (offsets.numel() - 1) // features
    rows, out_offsets, source = [], [0], []
    for sample in range(batch_size):
        for feature in range(features):
            _, divisor, first_id, row_offset, *_ = tables[feature].tolist()
            bag = feature * batch_size + sample
            for i in range(int(offsets[bag]), int(offsets[bag + 1])):
                quotient, remainder = divmod(first_id + int(ids[i]), divisor)
                rows += [row_offset + remainder, row_offset + divisor + quotient]
                source += [i, i]
            out_offsets.append(len(rows))
    return Lookups(
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(out_offsets, dtype=torch.int64),
        torch.tensor(source, dtype=torch.int32),
    )
