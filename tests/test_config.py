"""The kinds: what they cost, and what they refuse."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import DataType

import torchrec_cafe as tc
from torchrec_cafe.config import TableShape, remainder_rows
from torchrec_cafe.config import memory as constants
from torchrec_cafe.config.hashing import fewest_rows
from torchrec_cafe.ops import WEIGHTS_PER_LINE, SketchState, SlotMapState, bloom


def shapes(*sizes: int, dim: int = 16) -> list[TableShape]:
    return [
        TableShape(name=f"t{i}", num_embeddings=size, embedding_dim=dim)
        for i, size in enumerate(sizes)
    ]


@given(
    sizes=st.lists(st.integers(1, 3_000_000), min_size=1, max_size=20),
    compression=st.floats(1, 20_000),
    dim=st.sampled_from([4, 16, 64, 128]),
    kind=st.sampled_from([tc.Cafe, tc.Hash, tc.QuotientRemainder, tc.MemRec]),
    options=st.sampled_from(
        [{}, {"medium_fraction": 0.3}, {"num_shards": 64}, {"num_weight_hashes": 4}]
    ),
)
@settings(max_examples=300, deadline=None)
def test_promise_is_kept_or_refused(sizes, compression, dim, kind, options):
    tables = shapes(*sizes, dim=dim)
    if kind is tc.Cafe:
        kind = functools.partial(tc.Cafe, **options)
    try:
        allocation = kind(compression=compression).allocate(tables)
    except ValueError as error:
        message = str(error)
        assert "leaves no row" in message  # noqa: PT017  a refusal is a valid outcome
        if "largest compression that works is" in message:
            kind(compression=float(message.rsplit(" ", 1)[1])).allocate(tables)
        else:
            with pytest.raises(ValueError, match="leaves no row"):
                kind(compression=1).allocate(tables)
        return
    dense = sum(table.dense_bytes for table in tables)
    assert allocation.memory.dense_bytes == dense
    assert allocation.memory.total_bytes <= dense / compression
    for table in tables:
        # The quotient-remainder trick has a row for the quotient even where all are 0.
        most = table.num_embeddings + (kind is tc.QuotientRemainder)
        least = 0 if kind is tc.MemRec else 1  # whose rows are all in the pool
        assert least <= allocation.shared_rows[table.name] <= least * most


def test_breakdown_counts_what_is_allocated():
    tables = shapes(100_000, 5_000, 7)
    allocation = tc.Cafe(compression=20).allocate(tables)
    memory = allocation.memory
    state = SketchState.empty(
        shards=allocation.num_shards,
        buckets=allocation.buckets_per_shard,
        hot_rows=allocation.hot_rows_per_shard,
    )
    norms = 16 * allocation.num_shards * len(allocation.tracked)  # float64 [shards, tables, 2]
    held = sum(t.numel() * t.element_size() for t in state.tensors().values())
    assert held + norms == memory.sketch_bytes + memory.map_bytes
    assert memory.hot_bytes == allocation.num_shards * allocation.hot_rows_per_shard * 64
    second_rows = allocation.num_shards * allocation.second_rows_per_shard
    assert memory.shared_bytes == (sum(allocation.shared_rows.values()) + second_rows) * 64
    # Little of the budget is left unused.
    assert memory.compression < 20.1


def test_quotient_remainder_tells_all_ids_apart():
    tables = shapes(1_000_000, 5_000, 7, 1)
    allocation = tc.QuotientRemainder(compression=20).allocate(tables)
    for table in tables:
        rows = allocation.shared_rows[table.name]
        divisor = remainder_rows(table.num_embeddings, rows)
        assert divisor + -(-table.num_embeddings // divisor) == rows
    with pytest.raises(ValueError, match="the largest compression that works is 467"):
        tc.QuotientRemainder(compression=1000).allocate(tables)


@given(num_ids=st.integers(1, 2**40), extra=st.integers(0, 2**40))
def test_remainder_rows_are_as_many_as_fit(num_ids, extra):
    rows = min(fewest_rows(num_ids) + extra, num_ids + 1)
    divisor = remainder_rows(num_ids, rows)
    assert divisor + -(-num_ids // divisor) <= rows
    more = divisor + 1
    assert divisor == num_ids or more + -(-num_ids // more) > rows


def test_tables_that_get_all_their_rows_are_not_tracked():
    tables = shapes(3_000_000, 200_000, 3000)
    allocation = tc.Cafe(compression=50, whole_fraction=0.0).allocate(tables)
    assert allocation.shared_rows["t2"] == 3000
    assert allocation.tracked == ("t0", "t1")


def test_small_pools_have_fewer_virtual_shards():
    tables = shapes(3_000_000, 200_000)
    assert tc.Cafe(compression=10).allocate(tables).num_shards == 64
    few = tc.Cafe(compression=3000).allocate(tables)
    assert few.num_shards == 8
    assert tc.Cafe(compression=300, num_shards=64).allocate(tables).num_shards == 64


def test_small_tables_stay_whole_within_the_budget():
    allocation = tc.Cafe(compression=100).allocate(shapes(3_000_000, 200_000, 300, 12))
    assert allocation.shared_rows["t2"] == 300
    assert allocation.shared_rows["t3"] == 12
    assert allocation.tracked == ("t0", "t1")
    everything = tc.Cafe(compression=100, whole_fraction=0.0).allocate(shapes(3_000_000, 60_000))
    assert everything.tracked == ("t0", "t1")


def test_two_tables_of_mem_rec_fill_the_budget():
    tables = shapes(1_000_000, 500_000, 10, dim=32)
    allocation = tc.MemRec(compression=500).allocate(tables)
    rows = allocation.num_shards * allocation.token_rows_per_shard
    weights = allocation.num_shards * allocation.weights_per_shard
    assert allocation.memory.total_bytes == rows * 128 + weights * 4
    assert allocation.memory.total_bytes > 0.98 * sum(t.dense_bytes for t in tables) / 500
    assert weights * 4 == pytest.approx(0.6 * allocation.memory.total_bytes, rel=0.02)
    assert allocation.num_shards == 16  # 64 rows a shard or more
    assert allocation.tracked == ("t0", "t1", "t2")
    mild = tc.MemRec(compression=49).allocate(tables)
    assert mild.weights_per_shard == pytest.approx(mild.token_rows_per_shard, rel=0.05)
    exact = tc.MemRec(num_token_rows=4096, num_shards=16).allocate(tables)
    assert (exact.token_rows_per_shard, exact.weights_per_shard) == (256, 256)
    tiny = tc.MemRec(num_token_rows=3).allocate(tables)
    assert (tiny.num_shards, tiny.token_rows_per_shard, tiny.weights_per_shard) == (1, 3, 4)


@pytest.mark.parametrize("dim", [16, 128])
def test_weights_of_mem_rec_take_their_share_of_the_bytes(dim: int):
    tables = shapes(1_000_000, 500_000, 10, dim=dim)
    budget = sum(table.dense_bytes for table in tables) / 100
    for kind in (
        tc.MemRec(compression=100, weight_fraction=0.6),
        tc.MemRec(num_token_rows=int(0.4 * budget / (4 * dim)), weight_fraction=0.6),
    ):
        allocation = kind.allocate(tables)
        weights = allocation.num_shards * allocation.weights_per_shard
        assert weights * constants.WEIGHT_BYTES == pytest.approx(0.6 * budget, rel=0.03)
        assert 0.97 * budget < allocation.memory.total_bytes <= budget
    with pytest.raises(ValueError, match=r"weight_fraction must be in \(0, 1\) or None, got 1.0"):
        tc.MemRec(compression=100, weight_fraction=1.0)


def test_weights_leave_the_rows_what_they_need():
    kind = tc.Cafe(compression=100, num_weight_hashes=2, weight_fraction=0.6)
    tables = shapes(*[300] * 26, dim=16)
    plain = dataclasses.replace(kind, num_weight_hashes=0)
    assert kind.allocate(tables).weights_per_shard > 0
    largest = {
        kind: max(c for c in range(100, 400, 10) if _fits(kind, tables, c))
        for kind in (kind, plain)
    }
    assert largest[kind] >= 0.85 * largest[plain]


def _fits(kind: tc.Cafe, tables: list[TableShape], compression: float) -> bool:
    try:
        dataclasses.replace(kind, compression=compression).allocate(tables)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("dim", [16, 128])
def test_weights_of_cafe_take_their_share_of_the_budget(dim: int):
    tables = shapes(1_000_000, 500_000, 10, dim=dim)
    kind = tc.Cafe(compression=100, num_weight_hashes=4, weight_fraction=0.3)
    allocation = kind.allocate(tables)
    whole = 10 * dim * 4
    weights = allocation.num_shards * allocation.weights_per_shard * constants.WEIGHT_BYTES
    budget = sum(table.dense_bytes for table in tables) / 100 - whole
    assert weights == pytest.approx(0.3 * budget, rel=0.01)
    plain = tc.Cafe(compression=100, num_weight_hashes=0).allocate(tables)
    assert plain.weights_per_shard == 0
    assert plain.memory.total_bytes == pytest.approx(allocation.memory.total_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("compression", "hashes", "factors", "second_rows"),
    [(10, None, 0, 0), (100, None, 2, 0), (1000, None, 2, 0), (100, 0, 0, 0), (1000, 0, 0, 0.3)],
)
def test_factors_and_second_rows_come_with_the_compression(
    compression: float, hashes: int | None, factors: int, second_rows: float
):
    kind = tc.Cafe(compression=compression, num_weight_hashes=hashes)
    assert (kind.weight_hashes, kind.second_rows) == (factors, second_rows)
    allocation = kind.allocate(shapes(10_000_000, 5_000_000, dim=16))
    assert (allocation.weights_per_shard > 0) == (factors > 0)
    assert (allocation.second_rows_per_shard > 0) == (second_rows > 0)
    fixed = tc.Cafe(compression=compression, num_weight_hashes=0, medium_fraction=0.1)
    assert (fixed.weight_hashes, fixed.second_rows) == (0, 0.1)


@pytest.mark.parametrize("dtype", ["float16", torch.float16, DataType.FP16])
def test_memory_of_one_table(dtype):
    memory = tc.Cafe(compression=100).memory(1_000_000, 32, dtype)
    assert memory.dense_bytes == 1_000_000 * 64
    assert memory.total_bytes <= 640_000
    assert tc.Hash(compression=100).memory(1_000_000, 32, dtype).shared_bytes == 640_000


def test_kinds_are_values():
    assert tc.Cafe(compression=100) == tc.Cafe(compression=100.0)
    assert hash(tc.Hash(compression=2)) == hash(tc.Hash(compression=2))
    assert math.isclose(tc.Cafe(compression=1, half_life=10).growth(2.5) ** 4, 2)
    assert tc.Cafe(compression=1).growth(1e9) >= 1
    assert tc.Cafe(compression=1, half_life=1e-9).growth(1) == 2.0**60


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (tc.Cafe, {"compression": 0.5}, "compression must be a finite number >= 1, got 0.5"),
        (tc.Hash, {"compression": float("nan")}, "compression must be a finite number >= 1"),
        (tc.Cafe, {"compression": 9, "hot_fraction": 1}, r"hot_fraction must be in \(0, 1\)"),
        (tc.Cafe, {"compression": 9, "whole_fraction": 1}, r"whole_fraction must be in \[0, 1\)"),
        (tc.Cafe, {"compression": 9, "slots_per_hot_row": 0}, "slots_per_hot_row must be >= 1"),
        (tc.Cafe, {"compression": 9, "threshold": -1}, "threshold must be >= 0, got -1"),
        (tc.Cafe, {"compression": 9, "hysteresis": 1}, r"hysteresis must be in \[0, 1\)"),
        (tc.Cafe, {"compression": 9, "half_life": 0}, "half_life must be > 0, got 0"),
        (tc.Cafe, {"compression": 9, "rebalance_interval": 0}, "rebalance_interval must be >= 1"),
        (tc.Cafe, {"compression": 9, "num_shards": 0}, "num_shards must be in"),
        (tc.Cafe, {"compression": 9, "medium_fraction": 1}, r"medium_fraction must be in \[0, 1\)"),
        (tc.Cafe, {"compression": 9, "importance": "x"}, "importance must be one of .* got 'x'"),
        (tc.MemRec, {}, "give compression or num_token_rows, and not both"),
        (tc.MemRec, {"compression": 2, "num_token_rows": 5}, "and not both: got compression=2"),
        (tc.MemRec, {"compression": 0.5}, "compression must be a finite number >= 1"),
        (
            tc.MemRec,
            {"num_token_rows": 7, "num_shards": 8},
            "num_token_rows must be at least num_shards, 8, got 7",
        ),
        (tc.MemRec, {"compression": 2, "num_hashes": 0}, r"num_hashes must be in \[1, 16\], got 0"),
        (tc.MemRec, {"compression": 2, "per": "bag"}, r"per must be one of \('token', 'sample'\)"),
        (tc.MemRec, {"compression": 2, "num_weight_hashes": 17}, r"in \[1, 16\], got 17"),
        (tc.QuotientRemainder, {"compression": 0}, "compression must be a finite number >= 1"),
    ],
)
def test_kinds_refuse(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_shapes_and_groups_refuse():
    with pytest.raises(ValueError, match=r"table 't': embedding_dim must be a positive multiple"):
        TableShape(name="t", num_embeddings=9, embedding_dim=6)
    with pytest.raises(ValueError, match=r"table 't': num_embeddings must be in \[1, 2\*\*47\)"):
        TableShape(name="t", num_embeddings=0, embedding_dim=8)
    with pytest.raises(ValueError, match="same embedding_dim and dtype"):
        tc.Hash(compression=2).allocate([*shapes(9), *shapes(9, dim=8)])
    with pytest.raises(ValueError, match="tables must not be empty"):
        tc.Cafe(compression=2).allocate([])
    with pytest.raises(ValueError, match="dtype must be float32 or float16, got int8"):
        tc.Hash(compression=2).memory(9, 8, "int8")


def test_too_much_compression_names_what_works():
    with pytest.raises(ValueError, match="the largest compression that works is") as error:
        tc.Cafe(compression=1e6).allocate(shapes(1_000_000, 50_000))
    largest = float(str(error.value).rsplit(" ", 1)[1])
    tc.Cafe(compression=largest).allocate(shapes(1_000_000, 50_000))
    with pytest.raises(ValueError, match="leave the table uncompressed"):
        tc.Cafe(compression=2).memory(3, 16, "float32")


def test_constants_that_layers_may_not_share_agree():
    assert constants.WEIGHTS_PER_ROW == bloom.WEIGHTS_PER_ROW
    assert constants.WEIGHTS_PER_LINE == WEIGHTS_PER_LINE
    bits = bloom.BloomBits(
        first_shard=0, shards_held=1, per_shard=4, num_hashes=constants.MAX_HASHES
    )
    table = torch.tensor([[5, 1, 0, 0, 0]])
    bloom.bloom_rows(torch.arange(5), torch.arange(6), table, bits)  # and no more, says test_bloom


def test_look_ahead_tables_cost_their_slots():
    memory = tc.Lookahead(cache_fraction=0.01, min_slots=1).memory(1_000_000, 128, "float32")
    assert memory.hot_bytes == 10_000 * 512
    assert memory.map_bytes == 10_000 * constants.SLOT_MAP_BYTES
    assert memory.backing_bytes == memory.dense_bytes == 1_000_000 * 512
    assert memory.total_bytes == memory.hot_bytes + memory.map_bytes
    real = SlotMapState.empty(10_000)
    assert real.num_bytes == pytest.approx(memory.map_bytes, rel=0.001)
    kind = tc.Lookahead(cache_fraction=0.01, min_slots=500)
    assert [kind.slots_for(rows) for rows in (0, 3, 499, 9000, 10**6)] == [1, 3, 499, 500, 10_000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_fraction": 0.0}, r"cache_fraction must be in \(0, 1\], got 0.0"),
        ({"cache_fraction": 1.5}, r"cache_fraction must be in \(0, 1\], got 1.5"),
        ({"min_slots": 0}, "min_slots must be >= 1, got 0"),
        ({"path": ""}, "path must be a directory or None, got ''"),
        ({"io_threads": 0}, r"io_threads must be in \[1, 1024\], got 0"),
    ],
)
def test_look_ahead_tables_refuse_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tc.Lookahead(**arguments)


def test_factors_come_where_many_ids_share_a_row():
    hashes = {c: tc.Cafe(compression=c).weight_hashes for c in (1, 10, 49, 50, 1000)}
    assert hashes == {1: 0, 10: 0, 49: 0, 50: 2, 1000: 2}
    assert tc.Cafe(compression=1000, num_weight_hashes=0).weight_hashes == 0
    assert tc.Cafe(compression=10, num_weight_hashes=2).weight_hashes == 2
