"""Bags of several tables as bags of one: the operator against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import reference


def batches(lengths: list[int], num_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids, some out of range, of bags in feature-major order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths[: len(lengths) // num_features * num_features]
    ids = torch.randint(-2, 9, (sum(lengths),), generator=generator)
    return ids, torch.tensor([0, *lengths]).cumsum(0)


@given(
    lengths=st.lists(st.integers(0, 4), max_size=24),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_pooled_keys_match_reference(lengths, sizes, seed):
    ids, offsets = batches(lengths, len(sizes), seed)
    firsts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    ranges = torch.stack([firsts, torch.tensor(sizes)], 1)
    bad = torch.full((len(sizes),), 7)
    expected_bad = bad.clone()
    got = ops.pool_keys(ids, offsets, ranges, bad)
    expected = reference.pool_keys(ids, offsets, ranges, expected_bad)
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert torch.equal(bad, expected_bad)
    assert ((got.keys >= 0) & (got.keys < sum(sizes))).all()


def test_ids_of_a_table_without_rows_are_counted_and_left_out():
    ranges, bad = torch.tensor([[0, 3], [3, 0], [3, 2]]), torch.zeros(3, dtype=torch.int64)
    ids, offsets = torch.tensor([2, 5, 1]), torch.tensor([0, 1, 1, 2, 2, 2, 3])
    got = ops.pool_keys(ids, offsets, ranges, bad)
    assert got.keys.tolist() == [2, 4]
    assert got.source.tolist() == [0, 2]
    assert got.offsets.tolist() == [0, 1, 1, 1, 1, 1, 2]
    assert bad.tolist() == [0, 1, 0]


def test_opcheck():
    ids, offsets, ranges = torch.arange(4), torch.tensor([0, 1, 4]), torch.tensor([[0, 2], [2, 3]])
    bad = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(torch.ops.torchrec_cafe.pool_keys, (ids, offsets, ranges, bad))


def test_errors_name_the_argument():
    ids, offsets, ranges = torch.arange(4), torch.tensor([0, 1, 4]), torch.tensor([[0, 2], [2, 3]])
    bad = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="pool_keys: `ids` must be torch.int64, got torch.int32"):
        ops.pool_keys(ids.int(), offsets, ranges, bad)
    with pytest.raises(TypeError, match="`offsets` must be torch.int64, got torch.int32"):
        ops.pool_keys(ids, offsets.int(), ranges, bad)
    with pytest.raises(ValueError, match=r"`ranges` must have shape \[any, 2\], got \[2, 1\]"):
        ops.pool_keys(ids, offsets, ranges[:, :1].contiguous(), bad)
    with pytest.raises(ValueError, match=r"`out_of_range` must have shape \[2\], got \[1\]"):
        ops.pool_keys(ids, offsets, ranges, bad[:1])
    with pytest.raises(ValueError, match="`offsets` must ascend from 0 to the number of ids, 4"):
        ops.pool_keys(ids, offsets.flip(0), ranges, bad)
    for count, features in ((4, 2), (0, 2), (0, 1), (1, 0)):
        wanted = rf"`offsets` .* \+ 1 elements, got {count} for {features} features"
        with pytest.raises(ValueError, match=wanted):
            ops.pool_keys(ids, torch.zeros(count).long(), ranges[:features], bad[:features])
    with pytest.raises(ValueError, match="`ranges` must be >= 0, got -1 and 1"):
        ops.pool_keys(ids, offsets, ranges - 1, bad)
    assert bad.tolist() == [0, 0]


@given(size=st.integers(0, 50), slots=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_slots_of_occurrences_match_reference(size, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 100, (slots,), generator=generator, dtype=torch.int32)
    positions = torch.randint(0, slots, (size,), generator=generator, dtype=torch.int32)
    got = ops.slots_of_occurrences(found, positions)
    assert got.dtype is torch.int64
    assert torch.equal(got, reference.slots_of_occurrences(found, positions))
    torch.library.opcheck(torch.ops.torchrec_cafe.slots_of_occurrences.default, (found, positions))


def test_positions_out_of_range_are_refused():
    found, positions = torch.tensor([4, 5], dtype=torch.int32), torch.tensor([0, 2])
    with pytest.raises(TypeError, match="`positions` must be torch.int32, got torch.int64"):
        ops.slots_of_occurrences(found, positions)
    with pytest.raises(ValueError, match=r"`positions` must be in \[0, 2\), got 2"):
        ops.slots_of_occurrences(found, positions.int())
