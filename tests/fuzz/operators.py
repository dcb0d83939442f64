"""Good arguments of every operator, and ways to spoil them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import BloomBits, HotRows, PoolRows, SketchState, SlotMapState

SHARDS, HOT, SECOND, DIM = 4, 3, 2, 8
#: columns of ``tables``: 20 ids in 5 rows, 9 in 9 that are never hot, 11 in 3
TABLES = [[20, 5, 0, 0, 0], [9, 9, 0, 5, -1], [11, 3, 0, 14, 1]]
OF_SHARDS = [[20, SHARDS, 0, 0, 0], [9, SHARDS, 0, 0, 1]]
POOL = PoolRows(offset=17, hot_rows_per_shard=HOT, second_rows_per_shard=SECOND)
BITS = BloomBits(first_shard=0, shards_held=SHARDS, per_shard=8, num_hashes=2)
NUM_ROWS = 17 + SHARDS * (HOT + SECOND)

#: arguments by name, and what calls the operator with them
Call = tuple[Callable[..., Any], dict[str, Any]]


def bags(generator: torch.Generator, features: int, samples: int = 2) -> dict[str, Tensor]:
    lengths = torch.randint(0, 4, (features * samples,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, 9, (int(offsets[-1]),), generator=generator)
    return {"ids": ids, "offsets": offsets}


def sketch(generator: torch.Generator) -> SketchState:
    state = SketchState.empty(shards=SHARDS, buckets=2, hot_rows=HOT)
    keys = torch.randint(0, 20, (40,), generator=generator)
    ops.observe(state, keys, (keys % SHARDS).int(), torch.rand(40, generator=generator))
    ops.rebalance(state, torch.arange(SHARDS), num_medium=2)
    return state


def _state(given: dict[str, Tensor]) -> SketchState:
    names = ("buckets", "owners", "inflation", "counters")
    return SketchState(**{name: given.pop(name) for name in names})


def _slots(given: dict[str, Tensor]) -> SlotMapState:
    names = ("entries", "queue", "counters", "slots", "free")
    return SlotMapState(**{name: given.pop(name) for name in names})


def of_ids(generator: torch.Generator) -> dict[str, Call]:
    """Operators that turn ids into rows."""
    batch = bags(generator, 3)
    tables = torch.tensor(TABLES)
    buckets = sketch(generator).buckets
    starts = batch["offsets"][::2].contiguous()

    def remap(first_shard: int, num_shards: int, second: int, **given: Any) -> Any:
        pool = PoolRows(offset=17, hot_rows_per_shard=HOT, second_rows_per_shard=second)
        hot = HotRows(
            buckets=given.pop("buckets"),
            first_shard=first_shard,
            num_shards=num_shards,
            rows=pool,
        )
        return ops.remap(**given, hot=hot)

    mixed = {"ids": batch["ids"], "feature_offsets": starts}
    sizes = {"num_embeddings": tables[:, 0].clone(), "out_of_range": torch.zeros(3).long()}
    ranges = torch.tensor([[0, 20], [20, 9], [29, 11]])
    shard = {"first_shard": 0, "num_shards": SHARDS, "second": SECOND}
    found = ops.remap(
        **batch,
        tables=tables,
        hot=HotRows(buckets=buckets, first_shard=0, num_shards=SHARDS, rows=POOL),
    )._asdict()
    return {
        "mix_ids": (ops.mix_ids, {**mixed, **sizes}),
        "pool_keys": (
            ops.pool_keys,
            {**batch, "ranges": ranges, "out_of_range": torch.zeros(3).long()},
        ),
        "remap": (remap, {**batch, "tables": tables, "buckets": buckets, **shard}),
        "quotient_remainder": (ops.quotient_remainder, {**batch, "tables": tables}),
        "add_second_rows": (
            lambda **given: ops.add_second_rows(ops.Remapped(**given), POOL),
            found,
        ),
    }


def of_learning(generator: torch.Generator) -> dict[str, Call]:
    """Operators that learn from gradients."""
    state = sketch(generator).tensors()
    batch = bags(generator, 3)
    size = len(batch["ids"])
    learned = {
        "norms": torch.ones(SHARDS, 2, 2, dtype=torch.float64),
        "grad": torch.rand(6, DIM, generator=generator),
        "offsets": batch["offsets"],
        "keys": batch["ids"],
        "shards": (batch["ids"] % SHARDS).int(),
        "features": torch.tensor([0, -1, 1]),
        "weights": torch.rand(size, generator=generator),
    }

    scaled = {
        "table": torch.rand(NUM_ROWS, DIM, generator=generator),
        "rows": torch.randint(0, NUM_ROWS, (size,), generator=generator),
        "bag_offsets": batch["offsets"],
        "source": torch.arange(size, dtype=torch.int32),
        "taught": (batch["ids"] % (SHARDS + 1) - 1).int(),
        "weights_per_shard": 32,
        "num_hashes": 2,
    }

    def learn(**given: Any) -> Any:
        state = _state(given)
        nothing = torch.empty(0, dtype=torch.int64)
        remapped = ops.Remapped(
            nothing, nothing, nothing, given.pop("keys"), given.pop("shards"), nothing, nothing
        )
        first = state, given.pop("norms"), given.pop("grad"), given.pop("offsets"), remapped
        if "table" not in given:
            return ops.learn(*first, **given)
        table, *found, taught, per_shard, hashes = (given.pop(name) for name in scaled)
        rows = ops.ScaledRows(table, ops.Lookups(*found), taught, per_shard, hashes)
        return ops.learn_scaled(*first, rows, **given)

    return {
        "learn": (learn, {**state, **learned}),
        "learn_scaled": (learn, {**state, **learned, **scaled}),
    }


def of_sketch(generator: torch.Generator) -> dict[str, Call]:
    """Operators on the sketch, and on rows that change hands."""
    state = sketch(generator).tensors()
    keys = torch.randint(0, 20, (10,), generator=generator)
    seen = {"keys": keys, "shards": (keys % SHARDS).int(), "importance": torch.rand(10)}
    moves = {
        "selected": torch.arange(SHARDS),
        "actions": torch.randint(0, 4, (SHARDS, HOT), generator=generator).to(torch.int8),
        "new_keys": torch.randint(0, 11, (SHARDS, HOT), generator=generator),
    }

    def move_rows(**given: Any) -> None:
        parts = ops.Moves(*(given.pop(name) for name in ("selected", "actions", "new_keys")))
        ops.move_rows(given.pop("rows"), parts, given.pop("tables"), POOL, **given)

    rows = torch.rand(NUM_ROWS, DIM, generator=generator)
    tracked = torch.tensor([TABLES[0], TABLES[2]])
    return {
        "observe": (lambda **given: ops.observe(_state(given), **given), {**state, **seen}),
        "rebalance": (
            lambda **given: ops.rebalance(_state(given), **given),
            {**state, "selected": torch.arange(SHARDS), "num_medium": 2},
        ),
        "move_rows": (move_rows, {**moves, "rows": rows, "tables": tracked, "second_factor": 0.5}),
    }


def of_weights(generator: torch.Generator) -> dict[str, Call]:
    """Operators of MEM-REC and of learned factors."""
    batch = bags(generator, 2) | {"tables": torch.tensor(OF_SHARDS)}
    weights = torch.rand(SHARDS, BITS.per_shard, generator=generator)
    lines = torch.rand(SHARDS, 2 * ops.WEIGHTS_PER_LINE, generator=generator)
    rows = torch.rand(SHARDS * BITS.per_shard, DIM, generator=generator)
    given = {"per_sample_weights": torch.rand(len(batch["ids"]), generator=generator)}
    keys = torch.randint(0, 20, (7,), generator=generator)
    of_keys = {"keys": keys, "shards": (keys % (SHARDS + 1) - 1).int(), "num_hashes": 2}
    bits = {"first_shard": 0, "shards_held": SHARDS, "per_shard": BITS.per_shard, "num_hashes": 2}

    def bits_of(arguments: dict[str, Any]) -> BloomBits:
        return BloomBits(**{name: arguments.pop(name) for name in bits})

    def both(arguments: dict[str, Any]) -> dict[str, BloomBits]:
        one = bits_of(arguments)
        return {"row_bits": one, "weight_bits": one}

    found = ops.bloom_rows(**batch, bits=BITS)._asdict()
    numbers = torch.arange(len(batch["ids"]))
    gradients = {
        "grad": torch.rand(4, DIM),
        "table": rows,
        "keys": numbers * 7,
        "shards": (numbers % 2 - 1).int(),
        "features": torch.zeros(1, dtype=torch.int64),
        "given": torch.rand(len(numbers)),
        "num_hashes": 2,
    }
    grad = {"grad": torch.rand(4, DIM, generator=generator), "rows": rows}
    return {
        "bloom_rows": (lambda **a: ops.bloom_rows(bits=bits_of(a), **a), {**batch, **bits}),
        "bloom_union": (
            lambda **a: ops.bloom_union(bits=bits_of(a), of="weights", **a),
            {**batch, **bits},
        ),
        "bloom_weigh": (
            lambda **a: ops.bloom_weigh(bits=bits_of(a), **a),
            {"weights": weights, **batch, **bits},
        ),
        "bloom_pool": (
            lambda **a: ops.bloom_pool(**both(a), **a),
            {"rows": rows, "weights": weights, **batch, **bits, **given},
        ),
        "bloom_weigh_backward": (
            lambda **a: ops.bloom_weigh_backward(**both(a), **a),
            {**grad, **batch, **bits, **given},
        ),
        "key_factors": (
            ops.key_factors,
            {"weights": lines, **of_keys, "source": torch.tensor([6, 0, 3], dtype=torch.int32)},
        ),
        "factor_gradients": (
            lambda rows, offsets, source, shards_held, per_shard, **a: ops.factor_gradients(
                found=ops.Lookups(rows, offsets, source), shape=(shards_held, per_shard), **a
            ),
            {**found, **gradients, "shards_held": SHARDS, "per_shard": 32},
        ),
    }


def of_slots(generator: torch.Generator, folder: Path) -> dict[str, Call]:
    """Operators of look-ahead tables."""
    state = SlotMapState.empty(8)
    keys = torch.randint(0, 12, (6,), generator=generator)
    first = ops.announce_rows(keys, state, 1)
    plan = ops.plan_slots(first.rows, state, oldest=0, urgent=False, train=True)
    waiting = ops.announce_rows(keys % 5, state, 2)
    names = ("entries", "queue", "counters", "slots", "free")
    tensors = {name: getattr(state, name) for name in names}
    moved = {
        "into": torch.zeros(5, DIM),
        "into_rows": torch.tensor([4, 0, 2]),
        "source": torch.rand(9, DIM, generator=generator),
        "rows": torch.tensor([8, 0, 3]),
    }
    path = folder / "rows"
    if not path.exists():
        path.write_bytes(bytes(9 * DIM * 4))

    def with_file(call: Callable[..., None], **given: Any) -> None:
        with path.open("r+b") as file:
            call(file.fileno(), **given)

    in_file = {"rows": torch.tensor([8, 0, 3]), "num_threads": 2}
    places = torch.tensor([4, 0, 2])
    return {
        "announce_rows": (
            lambda **a: ops.announce_rows(state=_slots(a), **a),
            {"keys": keys, "number": 3, **tensors},
        ),
        "plan_slots": (
            lambda **a: ops.plan_slots(state=_slots(a), urgent=True, train=True, **a),
            {"rows": waiting.rows, "oldest": 1, **tensors},
        ),
        "retract_rows": (
            lambda **a: ops.retract_rows(state=_slots(a), **a),
            {"rows": waiting.rows, **tensors},
        ),
        "release_slots": (
            lambda **a: ops.release_slots(state=_slots(a), **a),
            {"held": plan.found, **tensors},
        ),
        "postpone_rows": (
            lambda **a: ops.postpone_rows(state=_slots(a), **a),
            {"rows": first.rows, "held": plan.found, **tensors},
        ),
        "slots_of_occurrences": (
            ops.slots_of_occurrences,
            {"found": plan.found, "positions": first.positions},
        ),
        "copy_rows": (ops.copy_rows, moved),
        "read_rows": (
            lambda **a: with_file(ops.read_rows, **a),
            {**in_file, "into": torch.zeros(5, DIM), "into_rows": places},
        ),
        "write_rows": (
            lambda **a: with_file(ops.write_rows, **a),
            {**in_file, "source": torch.rand(5, DIM), "source_rows": places},
        ),
    }


def operators(seed: int, folder: Path) -> dict[str, Call]:
    """Every operator with good arguments."""
    generator = torch.Generator().manual_seed(seed)
    makers = of_ids, of_learning, of_sketch, of_weights
    parts = [make(generator) for make in makers]
    return {name: call for part in parts for name, call in part.items()} | of_slots(
        generator, folder
    )
