"""Bloom encodings: operators against their definitions, and against theory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cafe import ops
from torchrec_cafe.ops import BloomBits, reference

SHARDS = 4
# Three features of tables of 1000, 3 and 50 ids: (ids, shards, first id, unused, number).
TABLES = torch.tensor([[1000, SHARDS, 0, 0, 0], [3, SHARDS, 0, 0, 1], [50, SHARDS, 0, 0, 2]])
ALL = {"first_shard": 0, "shards_held": SHARDS}


def batch_of(lengths: list[int], seed: int, tables: torch.Tensor = TABLES):
    """Ids of features with bags of these lengths."""
    batch_size = len(lengths) // len(tables)
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(0, int(tables[bag // batch_size, 0]), (length,), generator=generator)
        for bag, length in enumerate(lengths)
    ]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([*ids, torch.empty(0, dtype=torch.int64)]), offsets, tables


lengths_of_bags = st.lists(st.integers(0, 4), min_size=3, max_size=12).map(
    lambda lengths: lengths[: len(lengths) // 3 * 3]
)


@given(
    lengths=lengths_of_bags,
    per_shard=st.integers(1, 40),
    num_hashes=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_rows_match_reference(lengths, per_shard, num_hashes, seed):
    batch = batch_of(lengths, seed)
    bits = BloomBits(**ALL, per_shard=per_shard, num_hashes=num_hashes)
    got, expected = ops.bloom_rows(*batch, bits), reference.bloom_rows(*batch, bits)
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert ((got.rows >= 0) & (got.rows < SHARDS * per_shard)).all()
    of_an_id = torch.bincount(got.source, minlength=len(batch[0]))
    assert ((of_an_id >= 1) & (of_an_id <= num_hashes)).all()
    pairs = torch.stack([got.source.long(), got.rows])
    assert torch.unique(pairs, dim=1).shape == pairs.shape  # a bit is set once


@given(
    lengths=lengths_of_bags,
    per_shard=st.integers(1, 10).map(lambda n: 4 * n),
    num_hashes=st.integers(1, 16),
    dim=st.integers(1, 10).map(lambda n: 4 * n),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_weights_and_their_gradient_match_reference(lengths, per_shard, num_hashes, dim, seed):
    batch = batch_of(lengths, seed)
    bits = BloomBits(**ALL, per_shard=per_shard, num_hashes=num_hashes)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((SHARDS, per_shard), generator=generator)
    factors = ops.bloom_weigh(weights, *batch, bits)
    assert torch.equal(factors, reference.bloom_weigh(weights, *batch, bits))
    rows = torch.randn((SHARDS * 10, dim), generator=generator)
    grad = torch.randn((len(lengths), dim), generator=generator)
    options = {
        "row_bits": BloomBits(**ALL, per_shard=10, num_hashes=1 + num_hashes % 3),
        "weight_bits": bits,
        "per_sample_weights": torch.rand(len(batch[0]), generator=generator) if seed % 2 else None,
    }
    for table in (rows, rows.half()):
        found, grads = ops.bloom_weigh_backward(grad, table, *batch, **options)
        expected = reference.bloom_weigh_backward(grad, table, *batch, **options)
        assert torch.equal(found, expected[0])
        assert torch.equal(grads, expected[1])


@given(
    lengths=st.lists(st.integers(0, 90), min_size=3, max_size=9).map(
        lambda lengths: lengths[: len(lengths) // 3 * 3]
    ),
    dim=st.integers(1, 20).map(lambda n: 4 * n),
    num_hashes=st.integers(1, 4),
    half=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_pooling_matches_reference(lengths, dim, num_hashes, half, weighted, seed):
    batch = batch_of(lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((SHARDS * 10, dim), generator=generator)
    rows[0, :4] = torch.tensor([0.0, -0.0, 3e-7, -65504.0])  # zeros, subnormal and large as halves
    rows = rows.half() if half else rows
    weights = torch.randn((SHARDS, 8), generator=generator)
    options = {
        "row_bits": BloomBits(**ALL, per_shard=10, num_hashes=num_hashes),
        "weight_bits": BloomBits(**ALL, per_shard=8, num_hashes=5 - num_hashes),
        "per_sample_weights": torch.rand(len(batch[0])) if weighted else None,
    }
    pooled = ops.bloom_pool(rows, weights, *batch, **options)
    assert torch.equal(pooled, reference.bloom_pool(rows, weights, *batch, **options))


@pytest.mark.parametrize("of", ["rows", "weights"])
@given(
    lengths=st.lists(st.integers(0, 4), min_size=3, max_size=30).map(
        lambda lengths: lengths[: len(lengths) // 3 * 3]
    ),
    per_shard=st.one_of(st.integers(1, 40), st.integers(1000, 9000)),
    num_hashes=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_unions_match_reference(of, lengths, per_shard, num_hashes, seed):
    batch = batch_of(lengths, seed)
    bits = BloomBits(**ALL, per_shard=per_shard, num_hashes=num_hashes)
    got = ops.bloom_union(*batch, bits, of=of)
    expected = reference.bloom_union(*batch, bits, of=of)
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_unions_of_many_samples_are_those_of_their_rows():
    batch = batch_of([2, 0, 5, 1] * 3 * 1000, 0)
    bits = BloomBits(**ALL, per_shard=200, num_hashes=3)
    found, rows = ops.bloom_union(*batch, bits, of="rows"), ops.bloom_rows(*batch, bits)
    sample = (
        torch.arange(12000).div(3, rounding_mode="floor").repeat_interleave(rows.offsets.diff())
    )
    pairs = torch.unique(sample * SHARDS * 200 + rows.rows)  # sorted
    assert torch.equal(found.bits, pairs % (SHARDS * 200))
    assert torch.equal(
        found.offsets.diff(), torch.bincount(pairs // (SHARDS * 200), minlength=4000)
    )


def test_a_rank_finds_the_rows_that_one_rank_would():
    whole = BloomBits(**ALL, per_shard=10, num_hashes=3)
    ids, offsets = torch.arange(1000), torch.arange(1001)
    everywhere = ops.bloom_rows(ids, offsets, TABLES[:1], whole)
    rows, source = [], []
    for first in (0, 2):
        bits = BloomBits(first_shard=first, shards_held=2, per_shard=10, num_hashes=3)
        first_id = first * 1000 // SHARDS
        table = TABLES[:1].clone()
        table[0, 2] = first_id
        found = ops.bloom_rows(torch.arange(500), torch.arange(501), table, bits)
        rows.append(found.rows + first * 10)
        source.append(found.source + first_id)
    assert torch.equal(torch.cat(rows), everywhere.rows)
    assert torch.equal(torch.cat(source), everywhere.source)


@pytest.mark.parametrize(("num_hashes", "per_shard"), [(1, 200), (2, 200), (4, 500)])
def test_ids_collide_as_often_as_chance_says(num_hashes, per_shard):
    count = 8000
    table = torch.tensor([[count, 1, 0, 0, 0]])
    bits = BloomBits(first_shard=0, shards_held=1, per_shard=per_shard, num_hashes=num_hashes)
    found = ops.bloom_rows(torch.arange(count), torch.arange(count + 1), table, bits)
    # Every row is hit equally often, and an id misses a bit with the chance that two hashes meet.
    hits = torch.bincount(found.rows, minlength=per_shard).double()
    distinct = per_shard * (1 - (1 - 1 / per_shard) ** num_hashes)
    missing = num_hashes * count - len(found.rows)
    met = count * (num_hashes - distinct)
    assert abs(missing - met) < 6 * math.sqrt(met + 1)
    expected = count * distinct / per_shard
    chi_square = ((hits - expected) ** 2 / expected).sum()
    assert abs(chi_square - per_shard) < 6 * math.sqrt(2 * per_shard)


def test_token_rows_and_weights_are_hashed_apart():
    table = torch.tensor([[4000, 1, 0, 0, 0]])
    bits = BloomBits(first_shard=0, shards_held=1, per_shard=64, num_hashes=1)
    batch = torch.arange(4000), torch.arange(4001), table
    rows = ops.bloom_rows(*batch, bits).rows
    weights = ops.bloom_weigh(torch.arange(64.0).view(1, 64), *batch, bits).long()
    both = torch.bincount(64 * rows + weights, minlength=64 * 64)
    # Independent: about one id in every pair of bits.
    assert (both == 0).float().mean() == pytest.approx(math.exp(-4000 / 4096), abs=0.03)


def test_opcheck():
    batch = batch_of([2, 1, 0, 3, 1, 1], 0)
    operators = torch.ops.torchrec_cafe
    for num_hashes in (1, 3):
        torch.library.opcheck(operators.bloom_rows, (*batch, 0, SHARDS, 5, num_hashes))
        torch.library.opcheck(operators.bloom_union, (*batch, 0, SHARDS, 5, num_hashes, 8))
    torch.library.opcheck(operators.bloom_weigh, (torch.rand(SHARDS, 8), *batch, 0, 4))
    pooled = torch.rand(SHARDS * 5, 8), torch.rand(SHARDS, 8), *batch, torch.empty(0), 0, 2, 4
    torch.library.opcheck(operators.bloom_pool, pooled)
    rows = torch.rand(SHARDS * 5, 8)
    backward = torch.rand(6, 8), rows, *batch, torch.empty(0), 0, SHARDS, 8, 2, 4
    torch.library.opcheck(operators.bloom_weigh_backward, backward)


def test_errors_name_the_argument():
    ids, offsets, tables = batch_of([2, 1, 0, 3, 1, 1], 0)
    bits = BloomBits(**ALL, per_shard=8, num_hashes=2)
    weights = torch.rand(SHARDS, 8)
    with pytest.raises(TypeError, match="bloom_rows: `ids` must be torch.int64, got torch.int32"):
        ops.bloom_rows(ids.int(), offsets, tables, bits)
    with pytest.raises(ValueError, match="`offsets` must ascend from 0"):
        ops.bloom_rows(ids, offsets.flip(0), tables, bits)
    with pytest.raises(ValueError, match=r"features \* batch \+ 1 elements, got 6 for 3 features"):
        ops.bloom_rows(ids, offsets[:-1], tables, bits)
    with pytest.raises(ValueError, match=r"`num_hashes` must be in \[1, 16\], got 17"):
        ops.bloom_rows(ids, offsets, tables, BloomBits(**ALL, per_shard=8, num_hashes=17))
    none = BloomBits(first_shard=0, shards_held=0, per_shard=8, num_hashes=2)
    with pytest.raises(ValueError, match="`ids` must be empty on a rank of no shard"):
        ops.bloom_rows(ids, offsets, tables, none)
    assert len(ops.bloom_rows(ids[:0], 0 * offsets, tables, none).rows) == 0
    empty = ops.bloom_union(ids[:0], 0 * offsets, tables, none, of="rows")
    assert (len(empty.bits), empty.offsets.tolist()) == (0, [0, 0, 0])
    with pytest.raises(ValueError, match="bloom_union: `offsets` must ascend from 0"):
        ops.bloom_union(ids, offsets.flip(0), tables, bits, of="rows")
    with pytest.raises(ValueError, match=r"`of` must be one of \('rows', 'weights'\), got 'row'"):
        ops.bloom_union(ids, offsets, tables, bits, of="row")
    with pytest.raises(TypeError, match="bloom_weigh: `weights` must be torch.float32"):
        ops.bloom_weigh(weights.double(), ids, offsets, tables, bits)
    with pytest.raises(ValueError, match=r"`weights` must have shape \[4, 8\], got \[4, 12\]"):
        ops.bloom_weigh(torch.rand(SHARDS, 12), ids, offsets, tables, bits)
    odd = BloomBits(**ALL, per_shard=6, num_hashes=2)
    with pytest.raises(ValueError, match="`weights` must have a multiple of 4 columns, got 6"):
        ops.bloom_weigh(torch.rand(SHARDS, 6), ids, offsets, tables, odd)
    two = {"row_bits": bits, "weight_bits": bits}
    rows = torch.rand(SHARDS * 8, 4)
    with pytest.raises(TypeError, match="bloom_weigh_backward: `grad` must be torch.float32"):
        ops.bloom_weigh_backward(torch.rand(6, 4).double(), rows, ids, offsets, tables, **two)
    with pytest.raises(ValueError, match=r"`rows` must have shape \[32, any\], got \[31, 4\]"):
        ops.bloom_pool(rows[1:], weights, ids, offsets, tables, **two)
    with pytest.raises(ValueError, match=r"`per_sample_weights` must have shape \[8\], got \[7\]"):
        ops.bloom_pool(rows, weights, ids, offsets, tables, **two, per_sample_weights=torch.rand(7))
    with pytest.raises(TypeError, match="`rows` must be torch.float32 or torch.float16, got"):
        ops.bloom_pool(rows.bfloat16(), weights, ids, offsets, tables, **two)
    with pytest.raises(ValueError, match=r"`grad` must have shape \[6, 4\], got \[3, 4\]"):
        ops.bloom_weigh_backward(torch.rand(3, 4), rows, ids, offsets, tables, **two)
