"""Learned factors of tracked ids: operators against their definitions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import Lookups, reference
from torchrec_cafe.ops.reference.factors import weights_of_key

SHARDS = 3


def draw_keys(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys that repeat, some of them without a shard."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 40, (size,), generator=generator) | (1 << 48)
    shards = (keys % (SHARDS + 1)).int() - 1  # a key is always in the same shard
    return keys, shards


ALL = torch.zeros(1, dtype=torch.int64)  # one feature, whose ids may have shards


def draw_rows(lengths: list[int], num_keys: int, seed: int) -> Lookups:
    """Bags of one or two rows an id, of twenty."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 3, (sum(lengths),), generator=generator)
    rows = torch.randint(0, 20, (int(counts.sum()),), generator=generator)
    ids = torch.randint(0, num_keys, (len(counts),), generator=generator)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    offsets = ends[torch.tensor([0, *lengths]).cumsum(0)]
    return Lookups(rows, offsets, ids.repeat_interleave(counts).int())


def of_factors(grad: Tensor, keys: Tensor, shards: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the weights from that of the factors: of rows of one 1, a bag for each."""
    size = torch.arange(len(keys) + 1)
    found = Lookups(torch.zeros(len(keys), dtype=torch.int64), size, size[:-1].int())
    table = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    grad = grad[:, None] * torch.ones(4)
    return ops.factor_gradients(grad, table, found, keys, shards, features=ALL, **options)


def in_order(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ascending: each must be there once."""
    rows, order = rows.sort()
    assert (rows.diff() > 0).all()
    return rows, grads[order]


@given(
    size=st.integers(0, 300),
    per_shard=st.integers(1, 20).map(lambda n: 16 * n),
    num_hashes=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_factors_match_reference(size, per_shard, num_hashes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((SHARDS, per_shard), generator=generator)
    keys, shards = draw_keys(size, seed)
    factors = ops.key_factors(weights, keys, shards, num_hashes=num_hashes)
    assert torch.equal(factors, reference.key_factors(weights, keys, shards, num_hashes=num_hashes))
    assert (factors[shards < 0] == 1).all()
    source = torch.randint(0, max(1, size), (2 * size,), generator=generator, dtype=torch.int32)
    of_rows = ops.key_factors(weights, keys, shards, source, num_hashes=num_hashes)
    assert torch.equal(of_rows, factors[source])


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    dim=st.integers(1, 20).map(lambda n: 4 * n),
    features=st.lists(st.integers(-1, 2), min_size=1, max_size=4).map(torch.tensor),
    half=st.booleans(),
    with_given=st.booleans(),
    # Many weights, of which a batch hits few, are not added up where they lie.
    per_shard=(st.integers(1, 5) | st.integers(1000, 2000)).map(lambda n: 16 * n),
    num_hashes=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_gradients_match_reference(
    lengths, dim, features, half, with_given, per_shard, num_hashes, seed
):
    lengths = lengths * len(features)
    found, (keys, shards) = draw_rows(lengths, 30, seed), draw_keys(30, seed)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn((len(lengths), dim), generator=generator)
    table = torch.randn((20, dim), generator=generator)
    table = table.half() if half else table
    options = {
        "features": features,
        "given": torch.rand(30, generator=generator) if with_given else None,
        "shape": (SHARDS, per_shard),
        "num_hashes": num_hashes,
    }
    got = ops.factor_gradients(grad, table, found, keys, shards, **options)
    expected = reference.factor_gradients(grad, table, found, keys, shards, **options)
    for ours, theirs in zip(in_order(*got), in_order(*expected), strict=True):
        assert torch.equal(ours, theirs)


@given(key=st.integers(0, 2**62), lines=st.integers(1, 9), num_hashes=st.integers(1, 16))
def test_a_key_has_so_many_weights_in_one_line(key, lines, num_hashes):
    keys, shards = torch.tensor([key]), torch.zeros(1, dtype=torch.int32)
    shape = (1, 16 * lines)
    options = {"shape": shape, "num_hashes": num_hashes}
    rows, grads = of_factors(torch.ones(1), keys, shards, **options)
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
    rows, grads = of_factors(ones, keys, shards, shape=shape, num_hashes=4)
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
    rows, grads = of_factors(pull, keys, shards, shape=shape, num_hashes=3)
    dense = torch.zeros((SHARDS * 2, 16)).index_add_(0, rows, grads)
    torch.testing.assert_close(dense.view(shape).double(), weights.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lines", [3, 40_000])  # in one group of lines, and in many
def test_many_rows_are_added_up_as_autograd_does(lines):
    keys = torch.arange(60_000) * 7919
    shards = (keys % (SHARDS + 1)).int() - 1
    found = draw_rows([2, 0, 1] * 20_000, len(keys), 0)
    grad, table = torch.randn(60_000, 8), torch.randn(20, 8)
    shape = (SHARDS, 16 * lines)
    options = {"features": ALL, "shape": shape, "num_hashes": 2}
    rows, grads = in_order(*ops.factor_gradients(grad, table, found, keys, shards, **options))
    bags = torch.arange(60_000).repeat_interleave(found.offsets.diff())
    dots = torch.zeros(len(keys), dtype=torch.float64)
    dots.index_add_(0, found.source, (grad[bags] * table[found.rows]).sum(1).double())
    line, mask = lines_of_keys(keys, shards, shape)
    expected = torch.zeros((SHARDS * lines, 16), dtype=torch.float64)
    learns = shards >= 0
    expected.index_add_(0, line[learns], (mask * dots[:, None])[learns])
    assert torch.equal(rows, line[learns & (found.source.bincount(minlength=60_000) > 0)].unique())
    torch.testing.assert_close(grads.double(), expected[rows], rtol=1e-4, atol=1e-4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.factor_gradients(grad, table, found, keys, shards, **options)
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip(in_order(*alone), (rows, grads), strict=True):
        assert torch.equal(ours, theirs)


def lines_of_keys(keys: Tensor, shards: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The line of each key, and which of its weights are the key's, by two hashes."""
    lines, masks = torch.zeros(len(keys), dtype=torch.int64), torch.zeros((len(keys), 16))
    for i, (key, shard) in enumerate(zip(keys.tolist(), shards.tolist(), strict=True)):
        if shard >= 0:
            found = torch.tensor(weights_of_key(key, shard, shape[1], 2))
            lines[i] = found[0] // 16
            masks[i, found % 16] = 1
    return lines, masks


def test_a_rank_without_a_shard_has_no_weights():
    keys, shards = torch.arange(5), torch.full((5,), -1, dtype=torch.int32)
    weights = torch.empty(0, 16)
    assert ops.key_factors(weights, keys, shards, num_hashes=2).tolist() == [1.0] * 5
    rows, grads = of_factors(torch.ones(5), keys, shards, shape=(0, 16), num_hashes=2)
    assert (len(rows), grads.shape) == (0, (0, 16))


def test_opcheck():
    operators = torch.ops.torchrec_cafe
    keys, shards = draw_keys(20, 0)
    found, weights = draw_rows([2, 0, 1], 20, 0), torch.rand(SHARDS, 16)
    torch.library.opcheck(operators.key_factors, (weights, keys, shards, 3))
    torch.library.opcheck(operators.key_factors, (weights, keys, shards, 3, found.source))
    for given_too in (None, torch.rand(20)):
        arguments = torch.rand(3, 8), torch.rand(20, 8), *found, keys, shards, given_too, ALL
        torch.library.opcheck(operators.factor_gradients, (*arguments, SHARDS, 16, 3))


def test_errors_of_factors_name_the_argument():
    keys, shards = draw_keys(20, 0)
    weights = torch.rand(SHARDS, 16)
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
    with pytest.raises(TypeError, match="`source` must be torch.int32, got torch.int64"):
        ops.key_factors(weights, keys, shards, torch.arange(3), num_hashes=3)
    for wrong in (-1, 20):
        source = torch.tensor([0, wrong], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"`source` must be in \[0, 20\)"):
            ops.key_factors(weights, keys, shards, source, num_hashes=3)


def test_errors_of_gradients_name_the_argument():
    keys, shards = draw_keys(20, 0)
    found = draw_rows([2, 0, 1], 20, 0)
    valid: dict[str, Any] = {
        "grad": torch.rand(3, 8),
        "table": torch.rand(20, 8),
        "found": found,
        "keys": keys,
        "shards": shards,
        "features": ALL,
        "shape": (SHARDS, 16),
        "num_hashes": 3,
    }

    def refuses(error: type[Exception], message: str, **wrong: Any) -> None:
        with pytest.raises(error, match=message):
            ops.factor_gradients(**valid | wrong)

    ops.factor_gradients(**valid)
    refuses(ValueError, r"`grad` must have shape \[3, 8\], got \[2, 8\]", grad=torch.rand(2, 8))
    elsewhere = found._replace(rows=found.rows + 5)
    table = torch.rand(5, 8)
    refuses(ValueError, r"`rows` must be in \[0, 5\), got", table=table, found=elsewhere)
    few, none = (keys[:1], shards[:1]), (keys[:0], shards[:0])
    refuses(ValueError, r"`source` must be in \[0, 1\), got", keys=few[0], shards=few[1])
    refuses(ValueError, r"`source` must be in \[0, 0\), got", keys=none[0], shards=none[1])
    two = ALL.expand(2) + 0
    refuses(ValueError, "grad must be .samples . features, dim", features=two)
    refuses(TypeError, "`shards` must be torch.int32, got torch.int64", shards=shards.long())
    refuses(ValueError, r"`shards` must be -1 or in \[0, 2\)", shape=(2, 16))
    refuses(TypeError, "`table` must be torch.float32 or torch.float16, got", table=table.double())
    refuses(ValueError, r"`given` must have shape \[20\], got \[19\]", given=torch.rand(19))
    refuses(TypeError, "`given` must be torch.float32, got torch.float64", given=keys.double())
    refuses(ValueError, r"`num_hashes` must be in \[1, 16\], got 17", num_hashes=17)
