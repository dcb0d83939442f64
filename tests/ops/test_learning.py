"""Learning from gradients: the operator against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import Remapped, SketchState, reference

SHARDS, TABLES = 3, 2
FEATURES = torch.tensor([1, -1, 0, 1])


def batch_of(keys: list[int], shards: list[int]) -> Remapped:
    """The parts of a batch that learning reads."""
    return Remapped(
        rows=torch.empty(0, dtype=torch.int64),
        offsets=torch.empty(0, dtype=torch.int64),
        source=torch.empty(0, dtype=torch.int32),
        keys=torch.tensor(keys, dtype=torch.int64),
        shards=torch.tensor(shards, dtype=torch.int32),
        second=torch.empty(0, dtype=torch.int32),
        cold_shards=torch.empty(0, dtype=torch.int32),
    )


def random_batch(
    samples: int, occurrences: int, dim: int, seed: int
) -> tuple[Tensor, Tensor, Remapped]:
    generator = torch.Generator().manual_seed(seed)
    num_bags = samples * len(FEATURES)
    grad = torch.randn((num_bags, dim), generator=generator)
    if seed % 2:  # one-hot
        occurrences = num_bags
        offsets = torch.arange(num_bags + 1)
    else:
        inner = torch.randint(0, occurrences + 1, (num_bags - 1,), generator=generator).sort()
        offsets = torch.tensor([0, *inner.values.tolist(), occurrences])
    keys = torch.randint(0, 20, (occurrences,), generator=generator).tolist()
    shards = torch.randint(-1, SHARDS, (occurrences,), generator=generator).tolist()
    return grad, offsets, batch_of(keys, shards)


def empty() -> tuple[SketchState, Tensor]:
    state = SketchState.empty(shards=SHARDS, buckets=2, hot_rows=3)
    return state, torch.zeros((SHARDS, TABLES, 2), dtype=torch.float64)


@given(
    samples=st.sampled_from([1, 3, 300]),
    occurrences=st.sampled_from([0, 1, 9]),
    dim=st.sampled_from([4, 8, 20]),
    weighted=st.booleans(),
    bad=st.sampled_from([None, float("nan"), float("inf"), 1e38]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_learn_matches_reference(samples, occurrences, dim, weighted, bad, seed):
    grad, offsets, batch = random_batch(samples, occurrences, dim, seed)
    if bad is not None:
        grad[seed % len(grad)] = bad
    weights = torch.randn(len(batch.keys)) if weighted else None
    native, plain = empty(), empty()
    for _ in range(2):
        options = {"features": FEATURES, "weights": weights, "decay": 0.5, "growth": 1.5}
        ops.learn(*native, grad, offsets, batch, **options)
        reference.learn(*plain, grad, offsets, batch, **options)
    assert torch.equal(native[1], plain[1])
    for name, tensor in native[0].tensors().items():
        assert torch.equal(tensor, plain[0].tensors()[name]), name


def test_importance_is_the_norm_in_units_of_the_tables_mean():
    state, norms = empty()
    grad = torch.zeros((8, 4))
    grad[0], grad[3], grad[4] = 1.0, 2.0, 3.0  # all of table 1: norms 2, 4, 6
    # Feature 0 has ids 7 and 9 in samples 0 and 1, feature 3 has id 8 in sample 0.
    offsets, batch = torch.tensor([0, 1, 2, 2, 2, 2, 2, 3, 3]), batch_of([7, 9, 8], [0, 2, 1])
    weights = torch.tensor([1.0, -2.0, 1.0])
    ops.learn(state, norms, grad, offsets, batch, features=FEATURES, weights=weights)
    assert norms[0].tolist() == [[0.0, 2.0], [12.0, 4.0]]  # an empty bag counts, with norm 0
    mean = 12 / 4
    expected = {(7, 0): 2 / mean, (8, 1): 4 / mean, (9, 2): 2 * 6 / mean}
    for (key, shard), importance in expected.items():
        place = reference.find(state.buckets, shard, key)
        assert place is not None
        assert float(state.scores[shard][place]) == pytest.approx(importance)


def test_the_result_does_not_depend_on_threads():
    grad, offsets, batch = random_batch(3000, 20_000, 8, 0)
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            state, norms = empty()
            for _ in range(3):
                ops.learn(state, norms, grad, offsets, batch, features=FEATURES, decay=0.9)
            results.append((state, norms))
    finally:
        torch.set_num_threads(threads)
    for state, norms in results[1:]:
        assert torch.equal(norms, results[0][1])
        assert torch.equal(state.buckets, results[0][0].buckets)


def test_a_rank_without_shards_learns_nothing():
    state = SketchState.empty(shards=0, buckets=1, hot_rows=1)
    grad, offsets, _ = random_batch(2, 1, 4, 0)
    norms = torch.zeros((0, TABLES, 2), dtype=torch.float64)
    ops.learn(state, norms, grad, offsets, batch_of([1], [-1]), features=FEATURES)


def test_opcheck():
    state, norms = empty()
    grad, offsets, batch = random_batch(2, 5, 4, 0)
    torch.library.opcheck(
        torch.ops.torchrec_cafe.learn,
        (
            *(grad, offsets, batch.keys, batch.shards, torch.ones(5), FEATURES, norms),
            *(state.buckets, state.inflation, state.counters, 0.9, 1.0),
        ),
    )


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "learn: `grad` must be torch.float32", {"grad": torch.zeros(8, 4).half()}),
        (ValueError, "a row for each sample and feature, got 7 rows", {"grad": torch.zeros(7, 4)}),
        (ValueError, "a multiple of 4 columns, .* got 6", {"grad": torch.zeros(8, 6)}),
        (ValueError, r"`weights` must have shape \[2\]", {"weights": torch.zeros(3)}),
        (ValueError, r"`features` must be in \[-1, 2\), got 2", {"features": FEATURES + 1}),
        (ValueError, r"`decay` must be in \[0, 1\], got 2", {"decay": 2}),
        (ValueError, r"`growth` must be in \[1, 2\*\*60\], got 0", {"growth": 0}),
        (ValueError, "`offsets` must ascend from 0", {"offsets": torch.arange(9)}),
        (ValueError, r"`offsets` must have shape \[9\]", {"offsets": torch.arange(3)}),
        (ValueError, "`shards` must be in", {"batch": batch_of([1, 2], [0, 3])}),
        (ValueError, r"`norms` must have shape \[3, any, 2\]", {"norms": torch.zeros(1, 2, 2)}),
    ],
)
def test_learn_refuses_and_leaves_the_state(error, message, change):
    state, norms = empty()
    arguments = {
        "state": state,
        "norms": norms,
        "grad": torch.ones(8, 4),
        "offsets": torch.tensor([0, 1, 2, 2, 2, 2, 2, 2, 2]),
        "batch": batch_of([1, 2], [0, 1]),
        "features": FEATURES,
    }
    if "norms" in change:
        change = {"norms": change["norms"].double()}
    before = [tensor.clone() for tensor in (*state.tensors().values(), norms)]
    with pytest.raises(error, match=message):
        ops.learn(**(arguments | change))
    for tensor, expected in zip((*state.tensors().values(), norms), before, strict=True):
        assert torch.equal(tensor, expected)
