"""From ids to rows: the operators against their definition, and what a mapping must keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cafe import ops
from torchrec_cafe.ops import SketchState, reference


def mix(ids: list[int], num_embeddings: int) -> tuple[torch.Tensor, int]:
    out_of_range = torch.zeros(1, dtype=torch.int64)
    mixed = ops.mix_ids(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor([0, len(ids)]),
        torch.tensor([num_embeddings]),
        out_of_range,
    )
    return mixed, int(out_of_range)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 100, 1000, 4097])
def test_mixing_is_a_bijection(n):
    mixed, out_of_range = mix(list(range(n)), n)
    assert sorted(mixed.tolist()) == list(range(n))
    assert out_of_range == 0


@given(n=st.integers(1, 2**47 - 1), data=st.data())
@settings(max_examples=100, deadline=None)
def test_mixing_matches_reference(n, data):
    ids = data.draw(st.lists(st.integers(-3, n + 3), max_size=5))
    mixed, out_of_range = mix(ids, n)
    expected_out = torch.zeros(1, dtype=torch.int64)
    expected = reference.mix_ids(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor([0, len(ids)]),
        torch.tensor([n]),
        expected_out,
    )
    assert torch.equal(mixed, expected)
    assert out_of_range == int(expected_out)
    assert ((mixed >= 0) & (mixed < n)).all()


@pytest.mark.parametrize("n", [640, 6400, 100_000])
def test_mixing_spreads_neighbours(n):
    """The 1 % most popular ids of a frequency-sorted table spread evenly over 8 ranges."""
    popular = max(80, n // 100)
    mixed, _ = mix(list(range(popular)), n)
    counts = torch.bincount(mixed * 8 // n, minlength=8).double()
    expected = popular / 8
    # Chi-squared with 7 degrees of freedom: 24.3 is the 0.1 % quantile.
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_features_without_a_size_pass_through():
    out_of_range = torch.zeros(2, dtype=torch.int64)
    ids = torch.tensor([7, -5, 3, 99])
    mixed = ops.mix_ids(ids, torch.tensor([0, 2, 4]), torch.tensor([0, 10]), out_of_range)
    assert mixed[:2].tolist() == [7, -5]
    assert out_of_range.tolist() == [0, 1]


TABLES = torch.tensor([[20, 5, 0, 0, 0], [6, 6, 0, 5, -1], [9, 2, 0, 11, 1]])


def hot_rows_of(state: SketchState) -> ops.HotRows:
    return ops.HotRows(
        buckets=state.buckets,
        first_shard=0,
        num_shards=4,
        rows=ops.PoolRows(offset=13, hot_rows_per_shard=3),
    )


def hot_state() -> SketchState:
    """A sketch of four shards in which some ids of tables 0 and 2 own rows."""
    state = SketchState.empty(shards=4, buckets=2, hot_rows=3)
    ids = torch.cat([torch.arange(20), torch.arange(9)])
    offsets = torch.tensor([0, *[20] * 1, 20, 29])
    remapped = reference.remap(
        ids,
        offsets,
        TABLES,
        hot_rows_of(state),
    )
    tracked = remapped.shards >= 0
    ops.observe(
        state,
        remapped.keys[tracked],
        remapped.shards[tracked],
        torch.arange(int(tracked.sum())).float(),
    )
    ops.rebalance(state, torch.arange(4))
    return state


@given(lengths=st.lists(st.integers(0, 3), min_size=3, max_size=12), data=st.data())
@settings(max_examples=60, deadline=None)
def test_remap_matches_reference(lengths, data):
    lengths = lengths[: len(lengths) // 3 * 3]
    batch_size = len(lengths) // 3
    ids = [
        data.draw(st.integers(0, int(TABLES[bag // batch_size, 0]) - 1))
        for bag, length in enumerate(lengths)
        for _ in range(length)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])
    hot = hot_rows_of(hot_state())
    batch = (torch.tensor(ids, dtype=torch.int64), offsets, TABLES)
    got = ops.remap(*batch, hot)
    expected = reference.remap(*batch, hot)
    assert_same(got, expected)
    assert ((got.rows >= 0) & (got.rows < 13 + 4 * 3)).all()


def assert_same(got: ops.Remapped, expected: ops.Remapped) -> None:
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_remap_leaves_out_what_is_not_asked_for():
    ids, offsets = torch.arange(6), torch.tensor([0, 2, 4, 6])
    whole = ops.remap(ids, offsets, TABLES, hot_rows_of(hot_state()))
    part = ops.remap(ids, offsets, TABLES, hot_rows_of(hot_state()), with_source=False)
    assert (part.source.numel(), part.cold_shards.numel()) == (0, 0)
    assert torch.equal(part.rows, whole.rows)
    hashed = ops.remap(ids, offsets, TABLES, ops.HotRows.none())
    assert (hashed.keys.numel(), hashed.shards.numel(), hashed.source.numel()) == (0, 0, 6)
    expected = reference.remap(ids, offsets, TABLES, ops.HotRows.none())
    assert torch.equal(hashed.rows, expected.rows)


def test_remap_gives_hot_ids_their_own_rows():
    state = hot_state()
    ids, offsets = torch.arange(20), torch.tensor([0, 20, 20, 20])
    remapped = ops.remap(
        ids,
        offsets,
        TABLES,
        hot_rows_of(state),
    )
    hot = remapped.rows[remapped.rows >= 13]
    assert hot.numel() > 0
    assert hot.unique().numel() == hot.numel()
    cold = remapped.rows < 13
    assert torch.equal(remapped.rows[cold], (ids * TABLES[0, 1] // TABLES[0, 0])[cold])
    assert torch.equal(remapped.cold_shards, torch.where(cold, remapped.shards, -1))


def test_first_mixed_id_inverts_the_shared_row():
    for num_ids in range(1, 40):
        for rows in range(1, num_ids + 1):
            for row in range(rows + 1):
                first = ops.first_mixed_id(row, num_ids, rows)
                assert first == next(
                    (m for m in range(num_ids) if m * rows // num_ids >= row), num_ids
                )


def test_opcheck():
    state = hot_state()
    torch.library.opcheck(
        torch.ops.torchrec_cafe.mix_ids,
        (
            *(torch.arange(5), torch.tensor([0, 5]), torch.tensor([5])),
            torch.zeros(1, dtype=torch.int64),
        ),
    )
    torch.library.opcheck(
        torch.ops.torchrec_cafe.remap,
        (
            *(torch.arange(6), torch.tensor([0, 2, 4, 6]), TABLES, state.buckets),
            *(0, 4, 3, 4, 13, True),
        ),
    )


def test_errors_name_the_argument():
    ids, offsets, sizes = torch.arange(4), torch.tensor([0, 4]), torch.tensor([5])
    count = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(TypeError, match="mix_ids: `ids` must be torch.int64, got torch.int32"):
        ops.mix_ids(ids.int(), offsets, sizes, count)
    with pytest.raises(ValueError, match=r"`feature_offsets` must have shape \[2\], got \[1\]"):
        ops.mix_ids(ids, offsets[:1], sizes, count)
    with pytest.raises(ValueError, match="ascend from 0 to the number of ids"):
        ops.mix_ids(ids, torch.tensor([0, 3]), sizes, count)
    with pytest.raises(ValueError, match="`ids` must be contiguous"):
        ops.mix_ids(torch.arange(8)[::2], offsets, sizes, count)
    hot = ops.HotRows.none()
    with pytest.raises(ValueError, match=r"features \* batch \+ 1 elements, got 3 for 3 features"):
        ops.remap(ids, torch.tensor([0, 2, 4]), TABLES, hot)
    with pytest.raises(ValueError, match="`offsets` must ascend from 0 to the number of ids, 4"):
        ops.remap(ids, torch.tensor([0, 1, 2, 3]), TABLES, hot)
    with pytest.raises(ValueError, match=r"`tables` must have shape \[any, 5\]"):
        ops.remap(ids, offsets, TABLES[:, :3].contiguous(), hot)
