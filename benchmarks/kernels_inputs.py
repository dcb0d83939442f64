"""What :mod:`benchmarks.kernels` calls the operators with, and the bytes that they must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import zipf_ids
from torchrec_cafe import ops

SHARDS = 64
#: shards that a step rebalances
REBALANCED = 4
NUM_HASHES = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of batches and tables.

    Attributes:
        features: of a batch, a table each.
        samples: of a batch.
        pooling: ids of a bag.
        dim: columns of the rows.
        ids: of each table.
        buckets: of a shard of the sketch.
        copied_bytes: what the copy copies.
    """

    features: int = 26
    samples: int = 2048
    pooling: int = 1
    dim: int = 64
    ids: int = 1_000_000
    buckets: int = 16_384
    copied_bytes: int = 1 << 30

    def __str__(self) -> str:
        return f"{self.num_ids:,} ids"

    @property
    def num_bags(self) -> int:
        """Bags of a batch."""
        return self.features * self.samples

    @property
    def num_ids(self) -> int:
        """Ids of a batch."""
        return self.num_bags * self.pooling

    @property
    def is_large(self) -> bool:
        """Whether launches do not count beside what they do."""
        return self.pooling > 1


FULL = (Sizes(), Sizes(pooling=20))
QUICK = tuple(
    Sizes(samples=256, ids=20_000, buckets=64, pooling=pooling, copied_bytes=1 << 24)
    for pooling in (1, 20)
)
SMALL = Sizes(features=3, samples=40, pooling=2, dim=8, ids=400, buckets=4, copied_bytes=0)


@dataclass(frozen=True)
class Call:
    """An operator with its arguments.

    Attributes:
        run: calls it, given the module that has it.
        num_bytes: that it must read and write.
        changed: the arguments that it changes.
    """

    run: Callable[[ModuleType], Any]
    num_bytes: float
    changed: tuple[Tensor, ...] = ()


class Inputs:
    """A batch, and a sketch that has seen some.

    Args:
        sizes: of batch and tables.
        seed: of the batch; sketch and rows are drawn anew for each, too.
        device: where the tensors lie.
    """

    def __init__(self, sizes: Sizes, seed: int, device: torch.device) -> None:
        """Draw the tensors on the CPU; see the class."""
        self.sizes = sizes
        generator = torch.Generator().manual_seed(seed)
        rows_of = SHARDS * ((sizes.ids // 100 + SHARDS - 1) // SHARDS)
        shared = rows_of * sizes.features
        hot = max(1, sizes.buckets)
        pool = ops.PoolRows(offset=shared, hot_rows_per_shard=hot, second_rows_per_shard=hot // 8)
        columns = [[sizes.ids, rows_of, 0, f * rows_of, f] for f in range(sizes.features)]
        tables = torch.tensor(columns)
        state = ops.SketchState.empty(shards=SHARDS, buckets=sizes.buckets, hot_rows=hot)
        offsets = torch.arange(sizes.num_bags + 1) * sizes.pooling
        for step in range(4):
            ids = _ids(sizes, 4 * seed + step)
            batch = ops.remap(ids, offsets, tables, _hot(state, pool))
            importance = torch.rand(sizes.num_ids, generator=generator)
            ops.observe(state, batch.keys, batch.shards, importance)
            ops.rebalance(state, torch.arange(SHARDS), num_medium=hot)
        grad = torch.randn((sizes.num_bags, sizes.dim), generator=generator)
        norms = torch.zeros((SHARDS, sizes.features, 2), dtype=torch.float64)
        rows = torch.randn((shared + SHARDS * pool.rows_per_shard, sizes.dim), generator=generator)
        weights = torch.randn((SHARDS, max(64, sizes.buckets)), generator=generator)

        self.pool = pool
        self.ids, self.offsets, self.tables = (t.to(device) for t in (ids, offsets, tables))
        self.grad, self.norms, self.rows = (t.to(device) for t in (grad, norms, rows))
        self.importance, self.weights = importance.to(device), weights.to(device)
        self.features = torch.arange(sizes.features, device=device)
        self.selected = torch.arange(0, SHARDS, SHARDS // REBALANCED, device=device)
        self.state = _moved(state, device)
        self.batch = ops.remap(self.ids, self.offsets, self.tables, self.hot)
        self.lookups = ops.Lookups(self.batch.rows, self.batch.offsets, self.batch.source)
        # What a step later would move, of another state: this one is yet to be rebalanced.
        later = _moved(state, torch.device("cpu"))
        keys, shards = self.batch.keys.cpu(), self.batch.shards.cpu()
        ops.observe(later, keys, shards, importance.mul(9))
        actions, new_keys = ops.rebalance(later, self.selected.cpu())
        self.moves = ops.Moves(self.selected, actions.to(device), new_keys.to(device))
        # At most a bucket for each key, and all of them.
        self.buckets_hit = min(len(self.batch.keys.unique()), SHARDS * sizes.buckets)

    @property
    def hot(self) -> ops.HotRows:
        """Where ids find their rows."""
        return _hot(self.state, self.pool)


def _ids(sizes: Sizes, seed: int) -> Tensor:
    """Mixed ids, feature by feature; popular ones are anywhere."""
    size = sizes.samples * sizes.pooling
    return torch.cat(
        [zipf_ids(sizes.ids, size, 1.05, 100 * seed + f) for f in range(sizes.features)]
    )


def _hot(state: ops.SketchState, pool: ops.PoolRows) -> ops.HotRows:
    return ops.HotRows(buckets=state.buckets, first_shard=0, num_shards=SHARDS, rows=pool)


def _moved(state: ops.SketchState, device: torch.device) -> ops.SketchState:
    return ops.SketchState(**{n: t.to(device, copy=True) for n, t in state.tensors().items()})


def calls(inputs: Inputs) -> dict[str, Call]:
    """The operators of a training step by name.

    Args:
        inputs: of all of them; some change its tensors.
    """
    sizes, state, batch = inputs.sizes, inputs.state, inputs.batch
    n, bags, dim = sizes.num_ids, sizes.num_bags, sizes.dim
    sketch = tuple(state.tensors().values())
    learned = 12 * n + 128 * inputs.buckets_hit
    moved = int((inputs.moves.actions != ops.ACTION_KEEP).sum())

    bag_bytes = 8 * bags
    return {
        "mix_ids": _mix(inputs),
        "remap": Call(
            lambda m: m.remap(inputs.ids, inputs.offsets, inputs.tables, inputs.hot),
            8 * n + 64 * inputs.buckets_hit + 28 * n + 2 * bag_bytes,
        ),
        "observe": Call(
            lambda m: m.observe(state, batch.keys, batch.shards, inputs.importance),
            4 * n + learned,
            sketch,
        ),
        "learn": Call(
            lambda m: m.learn(
                *(state, inputs.norms, inputs.grad, inputs.offsets, batch),
                features=inputs.features,
            ),
            4 * bags * dim + bag_bytes + learned,
            (*sketch, inputs.norms),
        ),
        "rebalance": Call(
            lambda m: m.rebalance(state, inputs.selected, hysteresis=0.1),
            REBALANCED * (64 * sizes.buckets + 13 * inputs.pool.hot_rows_per_shard),
            sketch,
        ),
        "move_rows": Call(
            lambda m: m.move_rows(
                inputs.rows, inputs.moves, inputs.tables, inputs.pool, second_factor=1.0
            ),
            inputs.moves.actions.numel() + moved * (8 + 8 * dim),
            (inputs.rows,),
        ),
        **_factors(inputs),
    } | _mem_rec(inputs)


def _mem_rec(inputs: Inputs) -> dict[str, Call]:
    sizes, batch = inputs.sizes, (inputs.ids, inputs.offsets, inputs.tables)
    n, bag_bytes = sizes.num_ids, 8 * sizes.num_bags
    rows = _bits(len(inputs.rows) // SHARDS, 1)
    weights = _bits(inputs.weights.shape[1], NUM_HASHES)
    return {
        "bloom_rows": Call(lambda m: m.bloom_rows(*batch, rows), 20 * n + 2 * bag_bytes),
        "bloom_weigh": Call(
            lambda m: m.bloom_weigh(inputs.weights, *batch, weights),
            (12 + 4 * NUM_HASHES) * n + bag_bytes,
        ),
    }


def _bits(per_shard: int, num_hashes: int) -> ops.BloomBits:
    return ops.BloomBits(
        first_shard=0, shards_held=SHARDS, per_shard=per_shard, num_hashes=num_hashes
    )


def _mix(inputs: Inputs) -> Call:
    sizes = inputs.sizes
    starts = inputs.offsets[:: sizes.samples].contiguous()
    num_ids = inputs.tables[:, 0].contiguous()
    out_of_range = torch.zeros_like(num_ids)
    return Call(
        lambda m: m.mix_ids(inputs.ids, starts, num_ids, out_of_range),
        16 * sizes.num_ids,
        (out_of_range,),
    )


def _factors(inputs: Inputs) -> dict[str, Call]:
    batch, n = inputs.batch, inputs.sizes.num_ids
    bags, dim = inputs.sizes.num_bags, inputs.sizes.dim
    line = 4 * ops.WEIGHTS_PER_LINE
    of_rows = (4 * dim + 12 + 12 + 8 + line) * n
    state, per_shard = inputs.state, inputs.weights.shape[1]
    scaled = ops.ScaledRows(inputs.rows, inputs.lookups, batch.shards, per_shard, NUM_HASHES)
    options: dict[str, Any] = {"shape": tuple(inputs.weights.shape), "num_hashes": NUM_HASHES}
    return {
        "key_factors": Call(
            lambda m: m.key_factors(
                inputs.weights, batch.keys, batch.shards, num_hashes=NUM_HASHES
            ),
            (12 + line + 4) * n,
        ),
        "factor_gradients": Call(
            lambda m: m.factor_gradients(
                *(inputs.grad, inputs.rows, inputs.lookups, batch.keys, batch.shards),
                features=inputs.features,
                **options,
            ),
            4 * bags * dim + 8 * bags + of_rows,
        ),
        "learn_scaled": Call(
            lambda m: m.learn_scaled(
                *(state, inputs.norms, inputs.grad, inputs.offsets, batch, scaled),
                features=inputs.features,
            ),
            4 * bags * dim + 16 * bags + of_rows + 12 * n + 128 * inputs.buckets_hit,
            (*state.tensors().values(), inputs.norms),
        ),
    }
