"""Rows that move, second rows, quotient and remainder: operators against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cafe import ops
from torchrec_cafe.ops import HotRows, Moves, PoolRows, SketchState, reference

SHARDS, HOT, SECOND = 4, 3, 2
# 20 ids in 5 shared rows; 9 ids, never hot, in 9; 11 ids in 3.
TABLES = torch.tensor([[20, 5, 0, 0, 0], [9, 9, 0, 5, -1], [11, 3, 0, 14, 1]])
POOL = PoolRows(offset=17, hot_rows_per_shard=HOT, second_rows_per_shard=SECOND)
NUM_ROWS = 17 + SHARDS * (HOT + SECOND)


def learned(seed: int, num_medium: int = 2) -> SketchState:
    """A sketch that has seen ids of the tables, with hot, medium and cold ones."""
    generator = torch.Generator().manual_seed(seed)
    state = SketchState.empty(shards=SHARDS, buckets=2, hot_rows=HOT)
    for _ in range(3):
        batch = remap(torch.randint(0, 20, (60,), generator=generator) % 11, state)
        importance = torch.rand(60, generator=generator)
        ops.observe(state, batch.keys, batch.shards, importance)
        ops.rebalance(state, torch.arange(SHARDS), hysteresis=0.1, num_medium=num_medium)
    return state


def hot_rows(state: SketchState) -> HotRows:
    return HotRows(
        buckets=state.buckets,
        first_shard=0,
        num_shards=SHARDS,
        rows=POOL,
    )


def remap(ids: torch.Tensor, state: SketchState) -> ops.Remapped:
    return ops.remap(ids, offsets_of(ids), TABLES, hot_rows(state))


def offsets_of(ids: torch.Tensor) -> torch.Tensor:
    """Two samples' worth of ids of the first table, none of the second, the rest of the third."""
    half = ids.numel() // 4
    return torch.tensor([0, half, 2 * half, 2 * half, 2 * half, 3 * half, ids.numel()])


@given(seed=st.integers(0, 1000), num_medium=st.integers(0, 6), count=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_second_rows_match_reference(seed, num_medium, count):
    state = learned(seed, num_medium)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, 11, (count,), generator=generator)
    batch, offsets = remap(ids, state), offsets_of(ids)
    assert torch.equal(batch.second, reference.remap(ids, offsets, TABLES, hot_rows(state)).second)
    if seed % 2:
        batch = batch._replace(source=batch.source[:0])
    got = ops.add_second_rows(batch, POOL)
    expected = reference.add_second_rows(batch, POOL)
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert ((got.rows >= 0) & (got.rows < NUM_ROWS)).all()
    if num_medium == 0:
        assert torch.equal(got.rows, batch.rows)


def test_medium_ids_have_their_shared_row_and_a_second_one():
    state = learned(3)
    ids = torch.arange(12) % 11
    batch = remap(ids, state)
    got = ops.add_second_rows(batch, POOL)
    assert got.rows.numel() - batch.rows.numel() == (batch.second >= 0).sum() > 0
    # The second row is of the id's own shard, so that both are on one rank.
    for position in range(got.rows.numel() - 1):
        if got.source[position] != got.source[position + 1]:
            continue
        shard = int(batch.shards[got.source[position]])
        within = int(got.rows[position + 1]) - POOL.offset - shard * POOL.rows_per_shard
        assert got.rows[position] < POOL.offset
        assert HOT <= within < HOT + SECOND


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    columns=st.sampled_from([(), (1,), (5,)]),
)
@settings(max_examples=60, deadline=None)
def test_moves_match_reference(seed, dtype, columns):
    state = learned(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = remap(torch.randint(0, 11, (60,), generator=generator), state)
    ops.observe(state, batch.keys, batch.shards, 9 * torch.rand(60, generator=generator))
    selected = torch.tensor([0, 2, 3])
    moves = Moves(selected, *ops.rebalance(state, selected, min_score=1.0, num_medium=2))
    rows = torch.randn((NUM_ROWS, *columns), generator=generator).to(dtype)
    expected = rows.clone()
    tables = TABLES[[0, 2]]
    ops.move_rows(rows, moves, tables, POOL, second_factor=0.5)
    reference.move_rows(expected, moves, tables, POOL, second_factor=0.5)
    assert torch.equal(rows, expected)


def test_a_promoted_medium_id_gets_the_sum_of_its_rows():
    state = SketchState.empty(shards=SHARDS, buckets=2, hot_rows=HOT)
    shard = torch.tensor([1], dtype=torch.int32)
    key = 1 << 48 | 4  # id 4 of the last table, in its shared row 1
    ops.observe(state, torch.tensor([key]), shard, torch.ones(1))
    ops.rebalance(state, torch.tensor([1]), min_score=5.0, num_medium=1)
    assert (state.hot_rows == ops.MEDIUM).sum() == 1
    ops.observe(state, torch.tensor([key]), shard, torch.full((1,), 9.0))
    selected = torch.tensor([1])
    actions, new_keys = ops.rebalance(state, selected, min_score=5.0, num_medium=1)
    assert actions.tolist() == [[ops.ACTION_ADD, ops.ACTION_KEEP, ops.ACTION_KEEP]]
    rows = torch.arange(NUM_ROWS, dtype=torch.float32)
    tables = TABLES[[0, 2]]
    ops.move_rows(rows, Moves(selected, actions, new_keys), tables, POOL, second_factor=1.0)
    first = POOL.offset + POOL.rows_per_shard
    second = first + HOT + reference.second_row(key, SECOND)
    assert rows[first] == (14 + 1) + second


def test_a_newcomer_in_a_medium_slot_is_cold():
    state = SketchState.empty(shards=1, buckets=1, hot_rows=1)
    zeros = torch.zeros(5, dtype=torch.int32)
    ops.observe(state, torch.arange(5), zeros, torch.tensor([9.0, 1.0, 1.0, 1.0, 0.1]))
    ops.rebalance(state, torch.tensor([0]), num_medium=3)
    assert (state.hot_rows == ops.MEDIUM).sum() == 3
    ops.observe(state, torch.tensor([7]), zeros[:1], torch.tensor([50.0]))
    assert state.hot_rows[state.keys == 7].tolist() == [ops.COLD]
    ops.observe(state, torch.tensor([2]), zeros[:1], torch.tensor([1.0]))
    assert state.hot_rows[state.keys == 2].tolist() == [ops.MEDIUM]


@given(
    lengths=st.lists(st.integers(0, 3), min_size=3, max_size=12),
    divisors=st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 11)),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_quotient_remainder_matches_reference(lengths, divisors, data):
    lengths = lengths[: len(lengths) // 3 * 3]
    tables = TABLES.clone()
    tables[:, 1] = torch.tensor(divisors)
    batch_size = len(lengths) // 3
    ids = [
        data.draw(st.integers(0, int(tables[bag // batch_size, 0]) - 1))
        for bag, length in enumerate(lengths)
        for _ in range(length)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])
    arguments = torch.tensor(ids, dtype=torch.int64), offsets, tables
    got = ops.quotient_remainder(*arguments)
    expected = reference.quotient_remainder(*arguments)
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("divisor", [1, 3, 7, 20])
def test_no_two_ids_have_both_rows_in_common(divisor):
    tables = torch.tensor([[20, divisor, 0, 0, -1]])
    rows = ops.quotient_remainder(torch.arange(20), torch.arange(21), tables).rows.view(20, 2)
    assert len({tuple(pair) for pair in rows.tolist()}) == 20
    assert int(rows.max()) == divisor + -(-20 // divisor) - 1


def test_opcheck():
    state = learned(0)
    batch = remap(torch.arange(8) % 11, state)
    operators = torch.ops.torchrec_cafe
    torch.library.opcheck(
        operators.add_second_rows,
        (batch.rows, batch.offsets, batch.source, batch.second, POOL.offset),
    )
    torch.library.opcheck(
        operators.quotient_remainder, (torch.arange(6), torch.tensor([0, 2, 4, 6]), TABLES)
    )
    selected = torch.arange(SHARDS)
    actions, new_keys = ops.rebalance(state, selected)
    torch.library.opcheck(
        operators.move_rows,
        (
            *(torch.randn(NUM_ROWS, 4), actions, new_keys, selected, TABLES[[0, 2]]),
            *(POOL.rows_per_shard, POOL.offset, 1.0),
        ),
    )


def test_errors_name_the_argument():
    state = learned(0)
    batch = remap(torch.arange(8) % 11, state)
    with pytest.raises(ValueError, match="`second_rows_per_shard` must be in .*, got -1"):
        PoolRows(offset=0, hot_rows_per_shard=1, second_rows_per_shard=-1)
    with pytest.raises(TypeError, match=r"`batch.second` must be torch.int32, got torch.int64"):
        ops.add_second_rows(batch._replace(second=batch.second.long()), POOL)
    with pytest.raises(ValueError, match=r"`batch.second` must have shape \[8\]"):
        ops.add_second_rows(batch._replace(second=batch.second[1:]), POOL)
    with pytest.raises(ValueError, match=r"`batch.source` must have shape \[8\]"):
        ops.add_second_rows(batch._replace(source=batch.source[1:]), POOL)
    with pytest.raises(ValueError, match="`offsets` must ascend from 0"):
        ops.add_second_rows(batch._replace(offsets=batch.offsets.flip(0)), POOL)
    with pytest.raises(ValueError, match="`offsets` must have at least one element"):
        ops.add_second_rows(batch._replace(offsets=batch.offsets[:0]), POOL)
    with pytest.raises(ValueError, match=r"features \* batch \+ 1 elements, got 2 for 3"):
        ops.quotient_remainder(torch.arange(4), torch.tensor([0, 4]), TABLES)
    with pytest.raises(ValueError, match="`offsets` must ascend from 0"):
        ops.quotient_remainder(torch.arange(4), torch.tensor([0, 1, 2, 3]), TABLES)


def test_moves_that_cannot_be_are_refused_before_anything_moves():
    selected = torch.tensor([1])
    actions = torch.tensor([[ops.ACTION_CLEAR, ops.ACTION_COPY, 0]], dtype=torch.int8)
    tables = TABLES[[0, 2]]
    rows = torch.ones(NUM_ROWS, 4)

    def move(key: int, given: torch.Tensor) -> None:
        moves = Moves(selected, actions, torch.tensor([[0, key, 0]]))
        ops.move_rows(given, moves, tables, POOL, second_factor=1.0)

    with pytest.raises(ValueError, match="`rows` must hold every row that moves"):
        move(9 << 48, rows)  # a table that the pool does not have
    with pytest.raises(ValueError, match="`rows` must hold every row that moves"):
        move(3, rows[:19].contiguous())
    with pytest.raises(TypeError, match=r"float32, torch.float16 or torch.bfloat16, got"):
        move(3, rows.double())
    with pytest.raises(ValueError, match="`rows` must be contiguous"):
        move(3, rows.t())
    assert (rows == 1).all()
    move(3, rows)
    assert not rows[POOL.offset + POOL.rows_per_shard].any()
