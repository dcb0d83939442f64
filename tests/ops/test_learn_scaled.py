"""Learning and the gradient of factors in one pass: the operator against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.test_key_factors import in_order
from tests.ops.test_learning import FEATURES, SHARDS, TABLES, batch_of, empty, random_batch
from torchrec_cafe import ops
from torchrec_cafe.ops import Lookups, Remapped, ScaledRows, SketchState, reference

ROWS = 20


def draw_scaled(
    grad: Tensor, batch: Remapped, seed: int, *, weights_per_shard: int, half: bool = False
) -> ScaledRows:
    """Some rows of a batch's ids in its bags, and ids of which some teach nothing."""
    generator = torch.Generator().manual_seed(seed)
    num_ids = len(batch.keys)
    count = 0 if num_ids == 0 else 2 * num_ids
    inner = torch.randint(0, count + 1, (len(grad) - 1,), generator=generator).sort().values
    found = Lookups(
        torch.randint(0, ROWS, (count,), generator=generator),
        torch.tensor([0, *inner.tolist(), count]),
        torch.randint(0, max(1, num_ids), (count,), generator=generator, dtype=torch.int32),
    )
    table = torch.randn((ROWS, grad.shape[1]), generator=generator)
    teaches = torch.rand(num_ids, generator=generator) < 0.5
    return ScaledRows(
        table=table.half() if half else table,
        found=found,
        shards=torch.where(teaches, batch.shards, -1),
        weights_per_shard=weights_per_shard,
        num_hashes=3,
    )


def same(left: SketchState, right: SketchState) -> bool:
    others = right.tensors()
    return all(torch.equal(tensor, others[name]) for name, tensor in left.tensors().items())


@given(
    samples=st.sampled_from([1, 3, 300]),
    occurrences=st.sampled_from([0, 1, 9]),
    # The last is so wide that a block of samples is read in several parts, and that 300 samples
    # are more than a cache: what lies between the tracked features is read, too.
    dim=st.sampled_from([4, 20, 2048]),
    weighted=st.booleans(),
    half=st.booleans(),
    lines=st.sampled_from([1, 2000]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_learn_scaled_matches_reference(samples, occurrences, dim, weighted, half, lines, seed):
    grad, offsets, batch = random_batch(samples, occurrences, dim, seed)
    scaled = draw_scaled(grad, batch, seed, weights_per_shard=16 * lines, half=half)
    weights = torch.randn(len(batch.keys)) if weighted else None
    native, plain = empty(), empty()
    for _ in range(2):
        options = {"features": FEATURES, "weights": weights, "decay": 0.5, "growth": 1.5}
        got = ops.learn_scaled(*native, grad, offsets, batch, scaled, **options)
        expected = reference.learn_scaled(*plain, grad, offsets, batch, scaled, **options)
        for ours, theirs in zip(in_order(*got), in_order(*expected), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(native[1], plain[1])
    assert same(native[0], plain[0])


@pytest.mark.parametrize(
    "features",
    [
        pytest.param([0] * 8, id="all"),
        pytest.param([-1, 0, -1, -1, 1, -1, -1, -1], id="some, and what lies between is read"),
        pytest.param([-1] * 7 + [0], id="few"),
        pytest.param([-1] * 8, id="none"),
    ],
)
def test_it_is_the_two_operators_for_any_number_of_threads(features):
    grad, offsets, batch = random_batch(2400, 30_000, 256, 0)  # 10 MB, more than a cache
    features = torch.tensor(features)  # two samples of four features each are one of eight
    scaled = draw_scaled(grad, batch, 0, weights_per_shard=16 * 500)
    state, norms = empty()
    ops.learn(state, norms, grad, offsets, batch, features=features, decay=0.9)
    of_both = ops.factor_gradients(
        *(grad, scaled.table, scaled.found, batch.keys, scaled.shards),
        features=features,
        shape=(SHARDS, scaled.weights_per_shard),
        num_hashes=scaled.num_hashes,
    )
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            again = empty()
            options: dict[str, Any] = {"features": features, "decay": 0.9}
            got = ops.learn_scaled(*again, grad, offsets, batch, scaled, **options)
            assert torch.equal(again[1], norms)
            assert same(again[0], state)
            assert all(map(torch.equal, got, of_both))
    finally:
        torch.set_num_threads(threads)


def test_a_rank_without_shards_learns_nothing():
    state = SketchState.empty(shards=0, buckets=1, hot_rows=1)
    norms = torch.zeros((0, TABLES, 2), dtype=torch.float64)
    grad, offsets, _ = random_batch(2, 1, 4, 0)
    batch = batch_of([1], [-1])
    scaled = draw_scaled(grad, batch, 0, weights_per_shard=16)
    rows, grads = ops.learn_scaled(state, norms, grad, offsets, batch, scaled, features=FEATURES)
    assert rows.shape == (0,)
    assert grads.shape == (0, 16)


def test_opcheck():
    state, norms = empty()
    grad, offsets, batch = random_batch(2, 5, 4, 0)
    table, found, taught, *sizes = draw_scaled(grad, batch, 0, weights_per_shard=32)
    torch.library.opcheck(
        torch.ops.torchrec_cafe.learn_scaled,
        (
            *(grad, offsets, batch.keys, batch.shards, torch.ones(5), FEATURES, norms),
            *(state.buckets, state.inflation, state.counters, 0.9, 1.0),
            *(table, *found, taught, *sizes),
        ),
    )


#: a row in a bag of each of the first two tracked features
OFFSETS = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2])
SCALED: dict[str, Any] = {
    "table": torch.ones(5, 4),
    "found": Lookups(torch.tensor([0, 4]), OFFSETS, torch.tensor([0, 1]).int()),
    "shards": torch.tensor([0, -1]).int(),
    "weights_per_shard": 16,
    "num_hashes": 3,
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (
            TypeError,
            "learn_scaled: `table` must be torch.float32 or",
            {"table": torch.ones(5, 4).int()},
        ),
        (ValueError, r"`grad` must have shape \[8, 8\], got \[8, 4\]", {"table": torch.ones(5, 8)}),
        (ValueError, r"`rows` must be in \[0, 4\), got 4", {"table": torch.ones(4, 4)}),
        (TypeError, "`rows` must be torch.int64", {"rows": torch.tensor([0, 4]).int()}),
        (
            ValueError,
            r"`source` must be in \[0, 2\), got 2",
            {"source": torch.tensor([0, 2]).int()},
        ),
        (ValueError, r"`source` must have shape \[2\]", {"source": torch.tensor([0]).int()}),
        (ValueError, "`offsets` must ascend", {"offsets": torch.arange(9)}),
        (ValueError, r"`shards` must be -1 or in \[0, 3\)", {"shards": torch.tensor([0, 3]).int()}),
        (TypeError, "`shards` must be torch.int32", {"shards": torch.tensor([0, 1])}),
        (ValueError, "multiple of 16 columns, got 15", {"weights_per_shard": 15}),
        (ValueError, r"`num_hashes` must be in \[1, 16\], got 17", {"num_hashes": 17}),
        (ValueError, r"learn_scaled: `growth` must be in", {"growth": 0}),
        (ValueError, r"learn_scaled: `decay` must be in", {"decay": 2}),
        (ValueError, r"learn_scaled: `weights` must have shape \[2\]", {"weights": torch.ones(3)}),
    ],
)
def test_learn_scaled_refuses_and_leaves_the_state(error, message, change):
    state, norms = empty()
    change, scaled = dict(change), dict(SCALED)
    for part in Lookups._fields:
        if part in change:
            scaled["found"] = scaled["found"]._replace(**{part: change.pop(part)})
    for part in ScaledRows._fields:
        if part in change:
            scaled[part] = change.pop(part)
    before = [tensor.clone() for tensor in (*state.tensors().values(), norms)]
    given = (
        *(state, norms, torch.ones(8, 4), torch.tensor([0, 1, 2, 2, 2, 2, 2, 2, 2])),
        *(batch_of([1, 2], [0, 1]), ScaledRows(**scaled)),
    )
    with pytest.raises(error, match=message):
        ops.learn_scaled(*given, features=FEATURES, **change)
    for tensor, expected in zip((*state.tensors().values(), norms), before, strict=True):
        assert torch.equal(tensor, expected)


def test_what_is_written_shares_no_memory_with_the_rows():
    state, norms = empty()
    table = norms.view(-1).view(torch.float32).view(-1, 4)
    grad, offsets, batch = random_batch(2, 5, 4, 0)
    scaled = draw_scaled(grad, batch, 0, weights_per_shard=16)._replace(table=table)
    with pytest.raises(ValueError, match="`norms` must share no memory"):
        ops.learn_scaled(state, norms, grad, offsets, batch, scaled, features=FEATURES)
