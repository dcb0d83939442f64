"""Stack distances, counts and hit rates against those counted one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cache_simulation import fbgemm_lru_hits, in_batches, slot_map_hits
from benchmarks.common import zipf_ids
from torchrec_cafe.profile.distances import stack_distances
from torchrec_cafe.profile.hashing import HASH_RANGE, hash_keys
from torchrec_cafe.profile.hits import HitCurves, poisson_below
from torchrec_cafe.profile.sample import NEVER, Runs, SpatialSample


class Always:
    """In its batch a row is always at the same place."""

    def __init__(self, place):
        self.place = place

    def random(self, size):
        return np.full(size, self.place)


def runs_of(batches, begin, seed=0):
    """The runs of batches of distinct ids, by what the product hashes with."""
    numbers = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    ids = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in batches])
    keys = np.sort(hash_keys(ids, numbers.astype(np.uint64), seed))
    distinct, counts = np.unique(keys, return_counts=True)
    return Runs(
        distinct >> np.uint64(16), (distinct & np.uint64(0xFFFF)).astype(np.int64) + begin, counts
    )


def exact_distances(batches):
    """Of each access with a use before: least and most other rows used since."""
    last = {}
    found = []
    for number, batch in enumerate(batches):
        for id_ in set(batch):
            if id_ in last:
                after = sum(at > last[id_] for at in last.values())
                same = sum(at == last[id_] for at in last.values()) - 1
                found.append((number, number - last[id_], after, after + same))
        for id_ in set(batch):
            last[id_] = number
    return found


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=40),
    st.lists(st.integers(1, 40), max_size=4),
)
def test_distances_are_exact_whatever_the_pieces(batches, cuts):
    sample = SpatialSample(1000)
    least, most, gaps = [], [], []
    bounds = sorted({0, len(batches), *(cut for cut in cuts if cut < len(batches))})
    for begin, end in zip(bounds, bounds[1:], strict=False):
        accesses = sample.add(runs_of(batches[begin:end], begin))
        # A row whose batch-mates all come before it, or all after it.
        least += stack_distances(accesses, begin, end, Always(0.0)).tolist()
        most += stack_distances(accesses, begin, end, Always(1.0)).tolist()
        again = accesses.previous != NEVER
        gaps += (accesses.batches - accesses.previous)[again].tolist()
    exact = exact_distances(batches)
    assert Counter(gaps) == Counter(gap for _, gap, _, _ in exact)
    assert sorted(least) == sorted(low for _, _, low, _ in exact)
    assert sorted(most) == sorted(high for _, _, _, high in exact)


def test_distances_are_exact_when_batches_are_many_and_far_apart():
    """More batches than an array is made for, and more last uses than groups."""
    random = np.random.default_rng(0)
    sample = SpatialSample(10_000)
    batches = [random.choice(4000, 60, replace=False).tolist() for _ in range(300)]
    sample.add(runs_of(batches[:200], 0))
    begin = 3 << 20
    accesses = sample.add(runs_of(batches[200:], begin))
    found = stack_distances(accesses, begin, begin + 100, Always(0.0))
    exact = [low for number, _, low, _ in exact_distances(batches) if number >= 200]
    # Linear between 128 groups of 200 batches' last uses.
    assert np.abs(np.sort(found) - np.sort(exact)).max() <= 4000 / 128


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=2000), st.integers(16, 64))
def test_sampled_ids_are_counted_exactly(ids, capacity):
    sample = SpatialSample(capacity)
    for number, part in enumerate(np.array_split(np.array(ids), 5)):
        if len(part):
            sample.add(runs_of([part], number))
            sample.shrink()
    hash_of = {id_: int(runs_of([[id_]], 0).hashes[0]) for id_ in set(ids)}
    counts = Counter(hash_of[id_] for id_ in ids)
    lowest = sorted(counts)[:capacity]
    assert sample.hashes.tolist() == lowest
    assert sample.lookups.tolist() == [counts[hash_] for hash_ in lowest]
    assert (sample.rate == 1) == (len(counts) <= capacity)
    if sample.rate == 1:
        assert sample.num_distinct == len(counts)


def test_distinct_ids_are_within_the_error_of_a_bottom_k_sketch():
    """Relative standard error 1 / sqrt(k - 2) (Beyer et al., 2007); 4.5 of them in 20 seeds."""
    capacity, num_ids = 1024, 50_000
    for seed in range(20):
        sample = SpatialSample(capacity)
        for number, part in enumerate(np.array_split(np.arange(num_ids), 5)):
            sample.add(runs_of([part], number, seed))
            sample.shrink()
        error = abs(sample.num_distinct / num_ids - 1)
        assert error <= 4.5 / np.sqrt(capacity - 2)
        assert sample.threshold < HASH_RANGE


def test_hashes_are_spread_evenly_and_by_seed():
    ids = np.arange(1 << 16)
    zeros = np.zeros(len(ids), dtype=np.uint64)
    keys = hash_keys(ids, zeros, 0)
    assert len(np.unique(keys)) == len(ids)
    # Binomial: 4096 expected in each sixteenth, standard deviation 62.
    counts = np.bincount((keys >> np.uint64(60)).astype(np.int64))
    assert np.abs(counts - 4096).max() < 5 * 62
    assert not np.isin(hash_keys(ids, zeros, 1), keys).any()
    np.testing.assert_array_equal(keys & np.uint64(0xFFFF), 0)


def test_poisson_below_adds_up():
    assert poisson_below(1, np.array([0.0, 1.0])) == pytest.approx([1, np.exp(-1)])
    assert poisson_below(32, np.array([32.0]))[0] == pytest.approx(0.4765, abs=1e-3)


def curves_of(batches, capacity, depth=4):
    sample, curves = SpatialSample(capacity), HitCurves(depth, seed=0)
    for begin in range(0, len(batches), 100):
        part = batches[begin : begin + 100]
        runs = runs_of(part, begin)
        rows = np.bincount(runs.batches - begin, minlength=len(part))
        curves.add(sample.add(runs), rows, begin)
        sample.shrink()
    return curves


# One of 4000 sampled ids stands for 1 / rate others: a hit rate of p has a standard error below
# sqrt(p (1 - p) / 4000) = .008 of independent ids; two points are 2.5 of them.
@pytest.mark.parametrize("exponent", [0.8, 1.05])
@pytest.mark.parametrize(("capacity", "tolerance"), [(1 << 20, 0.012), (4000, 0.02)])
def test_predicted_hits_are_those_of_the_real_caches(exponent, capacity, tolerance):
    """FBGEMM's cache and our slot map's planning, on a Zipf trace, within two points."""
    batches = in_batches(zipf_ids(50_000, 400_000, exponent, seed=3).numpy(), 1000)
    curves = curves_of(batches, capacity)
    largest = max(len(np.unique(batch)) for batch in batches)
    for rows in (1.3 * largest, 2 * largest, 4 * largest, 8 * largest, 20 * largest, 40_000):
        rows = int(rows)
        size = np.array([float(rows)])
        lru = fbgemm_lru_hits(batches, rows)
        assert curves.set_associative(size)[0] == pytest.approx(lru, abs=tolerance), rows
        ahead = slot_map_hits(batches, rows, depth=4)
        assert curves.look_ahead(size)[0] == pytest.approx(ahead, abs=tolerance), rows


@pytest.mark.parametrize("depth", [0, 1, 8])
def test_predicted_hits_follow_the_depth(depth):
    batches = in_batches(zipf_ids(50_000, 300_000, 0.8, seed=3).numpy(), 1000)
    curves = curves_of(batches, 1 << 20, depth)
    for rows in (1300, 2500, 5000, 15_000):
        ahead = slot_map_hits(batches, rows, depth)
        predicted = curves.look_ahead(np.array([float(rows)]))[0]
        assert predicted == pytest.approx(ahead, abs=0.02), rows


def test_simulation_refuses_a_batch_that_does_not_fit():
    assert slot_map_hits([np.arange(100)], 99, 4) is None
