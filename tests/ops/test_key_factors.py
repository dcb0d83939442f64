"""Learned factors of tracked ids: operators against their definitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import Lookups, reference

SHARDS = 3


def draw_keys(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys that repeat, some of them without a shard."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 40, (size,), generator=generator) | (1 << 48)
    shards = (keys % (SHARDS + 1)).int() - 1  # a key is always in the same shard
    return keys, shards


ALL = torch.zeros(1, dtype=torch.int64)  # one feature, whose ids may have shards


def draw_rows(lengths: list[int], seed: int) -> tuple[Lookups, Tensor]:
    """Bags of ids that have one or two rows of twenty each; the shards of the ids."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 3, (sum(lengths),), generator=generator)
    rows = torch.randint(0, 20, (int(counts.sum()),), generator=generator)
    ids = torch.randperm(len(counts), generator=generator)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    offsets = ends[torch.tensor([0, *lengths]).cumsum(0)]
    shards = torch.randint(-1, 2, (len(counts),), generator=generator, dtype=torch.int32)
    return Lookups(rows, offsets, ids.repeat_interleave(counts).int()), shards


@given(
    size=st.integers(0, 300),
    # Many weights, of which a batch hits few, are not added up where they lie.
    per_shard=(st.integers(1, 20) | st.integers(1000, 2000)).map(lambda n: 16 * n),
    num_hashes=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_factors_and_their_gradient_match_reference(size, per_shard, num_hashes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((SHARDS, per_shard), generator=generator)
    keys, shards = draw_keys(size, seed)
    factors = ops.key_factors(weights, keys, shards, num_hashes=num_hashes)
    assert torch.equal(factors, reference.key_factors(weights, keys, shards, num_hashes=num_hashes))
    assert (factors[shards < 0] == 1).all()
    grad = torch.randn(size, generator=generator)
    options = {"shape": (SHARDS, per_shard), "num_hashes": num_hashes}
    rows, grads = ops.key_factors_backward(grad, keys, shards, **options)
    expected = reference.key_factors_backward(grad, keys, shards, **options)
    assert torch.equal(rows, expected[0])
    assert torch.equal(grads, expected[1])


@given(key=st.integers(0, 2**62), lines=st.integers(1, 9), num_hashes=st.integers(1, 16))
def test_a_key_has_so_many_weights_in_one_line(key, lines, num_hashes):
    keys, shards = torch.tensor([key]), torch.zeros(1, dtype=torch.int32)
    shape = (1, 16 * lines)
    options = {"shape": shape, "num_hashes": num_hashes}
    rows, grads = ops.key_factors_backward(torch.ones(1), keys, shards, **options)
    assert rows.numel() == 1
    assert 0 <= int(rows) < lines
    assert grads.sum() == num_hashes
    parts = [16 * part // num_hashes for part in range(num_hashes + 1)]
    for begin, end in pairwise(parts):
        assert grads[0, begin:end].sum() == 1
    start = torch.full(shape, 1 / num_hashes)
    factor = ops.key_factors(start, keys, shards, num_hashes=num_hashes)
    torch.testing.assert_close(factor, torch.ones(1))


def test_lines_and_weights_are_drawn_evenly():
    keys, shards = torch.arange(200_000), torch.zeros(200_000, dtype=torch.int32)
    shape = (1, 16 * 50)
    ones = torch.ones(len(keys))
    rows, grads = ops.key_factors_backward(ones, keys, shards, shape=shape, num_hashes=4)
    assert sorted(rows.tolist()) == list(range(50))
    # 4000 keys a line and 1000 a weight: binomial, 6 standard deviations at most.
    assert (grads.sum(1) / 4 - 4000).abs().max() < 6 * 4000**0.5
    assert (grads - 1000).abs().max() < 6 * 1000**0.5
    # Two keys of a line share all four weights as often as chance has it.
    weights = torch.rand(shape)
    same = ops.key_factors(weights, keys, shards, num_hashes=4).unique().numel()
    assert same == pytest.approx(50 * 256, rel=0.01)  # nearly all of them are hit


def test_the_gradient_is_that_of_autograd():
    weights = torch.randn((SHARDS, 32), dtype=torch.float64, requires_grad=True)
    keys, shards = draw_keys(100, 0)
    pull = torch.randn(100)
    factors = reference.key_factors(weights, keys, shards, num_hashes=3)
    (factors * pull.double()).sum().backward()
    assert weights.grad is not None
    shape = (SHARDS, 32)
    rows, grads = ops.key_factors_backward(pull, keys, shards, shape=shape, num_hashes=3)
    dense = torch.zeros((SHARDS * 2, 16)).index_add_(0, rows, grads)
    torch.testing.assert_close(dense.view(shape).double(), weights.grad, rtol=1e-5, atol=1e-5)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    dim=st.integers(1, 20).map(lambda n: 4 * n),
    features=st.lists(st.integers(-1, 2), min_size=1, max_size=4).map(torch.tensor),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_dots_match_reference(lengths, dim, features, half, seed):
    lengths = lengths * len(features)
    found, shards = draw_rows(lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn((len(lengths), dim), generator=generator)
    table = torch.randn((20, dim), generator=generator)
    table = table.half() if half else table
    options = {"shards": shards, "features": features}
    dots = ops.row_dots(grad, table, found, **options)
    assert torch.equal(dots, reference.row_dots(grad, table, found, **options))
    assert (dots[shards < 0] == 0).all()


def test_many_bags_are_those_of_one_thread():
    found, shards = draw_rows([2, 0, 1] * 5000, 0)
    grad, table = torch.randn(15000, 8), torch.randn(20, 8)
    dots = ops.row_dots(grad, table, found, shards=shards, features=ALL)
    bags = torch.arange(15000).repeat_interleave(found.offsets.diff())
    products = (grad[bags] * table[found.rows]).sum(1)
    expected = torch.zeros(len(shards)).index_add_(0, found.source.long(), products)
    expected[shards < 0] = 0
    torch.testing.assert_close(dots, expected, rtol=1e-4, atol=1e-4)


def test_a_rank_without_a_shard_has_no_weights():
    keys, shards = torch.arange(5), torch.full((5,), -1, dtype=torch.int32)
    weights = torch.empty(0, 16)
    assert ops.key_factors(weights, keys, shards, num_hashes=2).tolist() == [1.0] * 5
    options = {"shape": (0, 16), "num_hashes": 2}
    rows, grads = ops.key_factors_backward(torch.ones(5), keys, shards, **options)
    assert (len(rows), grads.shape) == (0, (0, 16))


def test_opcheck():
    operators = torch.ops.torchrec_cafe
    keys, shards = draw_keys(20, 0)
    torch.library.opcheck(operators.key_factors, (torch.rand(SHARDS, 16), keys, shards, 3))
    backward = torch.rand(20), keys, shards, SHARDS, 16, 3
    torch.library.opcheck(operators.key_factors_backward, backward)
    found, of_ids = draw_rows([2, 0, 1], 0)
    table = torch.rand(20, 8)
    torch.library.opcheck(operators.row_dots, (torch.rand(3, 8), table, *found, of_ids, ALL))


def test_errors_name_the_argument():
    keys, shards = draw_keys(20, 0)
    weights, table = torch.rand(SHARDS, 16), torch.rand(20, 8)
    with pytest.raises(TypeError, match="key_factors: `keys` must be torch.int64, got torch.int32"):
        ops.key_factors(weights, keys.int(), shards, num_hashes=3)
    with pytest.raises(ValueError, match=r"key_factors: `shards` must have shape \[20\], got \[19"):
        ops.key_factors(weights, keys, shards[1:], num_hashes=3)
    with pytest.raises(ValueError, match=r"`shards` must be -1 or in \[0, 2\)"):
        ops.key_factors(weights[1:], keys, shards, num_hashes=3)
    with pytest.raises(ValueError, match=r"`num_hashes` must be in \[1, 16\], got 0"):
        ops.key_factors(weights, keys, shards, num_hashes=0)
    with pytest.raises(ValueError, match="`weights` must have a multiple of 16 columns, got 8"):
        ops.key_factors(torch.rand(SHARDS, 8), keys, shards, num_hashes=3)
    options = {"shape": (SHARDS, 16), "num_hashes": 3}
    with pytest.raises(ValueError, match=r"`grad` must have shape \[20\], got \[19\]"):
        ops.key_factors_backward(torch.rand(19), keys, shards, **options)
    found, shards = draw_rows([2, 0, 1], 0)
    with pytest.raises(ValueError, match=r"`grad` must have shape \[3, 8\], got \[2, 8\]"):
        ops.row_dots(torch.rand(2, 8), table, found, shards=shards, features=ALL)
    elsewhere = found._replace(rows=found.rows + 5)
    with pytest.raises(ValueError, match=r"`rows` must be in \[0, 5\), got"):
        ops.row_dots(torch.rand(3, 8), table[:5], elsewhere, shards=shards, features=ALL)
    with pytest.raises(ValueError, match=r"`source` must be in \[0, 2\), got 2"):
        ops.row_dots(torch.rand(3, 8), table, found, shards=shards[:2], features=ALL)
    with pytest.raises(ValueError, match=r"`source` must be in \[0, 0\), got"):
        ops.row_dots(torch.rand(3, 8), table, found, shards=shards[:0], features=ALL)
    with pytest.raises(ValueError, match="grad must be .samples . features, dim"):
        ops.row_dots(torch.rand(3, 8), table, found, shards=shards, features=ALL.expand(2) + 0)
    with pytest.raises(TypeError, match="`shards` must be torch.int32, got torch.int64"):
        ops.row_dots(torch.rand(3, 8), table, found, shards=shards.long(), features=ALL)
    with pytest.raises(TypeError, match="`table` must be torch.float32 or torch.float16, got"):
        ops.row_dots(torch.rand(3, 8), table.double(), found, shards=shards, features=ALL)
