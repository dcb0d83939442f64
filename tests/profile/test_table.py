"""Statistics of whole traces against exact counts, where everything is sampled and where not."""

import math
from collections import Counter

import numpy as np
import pytest

from benchmarks.cache_simulation import in_batches
from benchmarks.common import zipf_ids, zipf_ranks
from torchrec_cafe.profile import TableProfile, TraceOptions, profile_trace
from torchrec_cafe.profile.coverage import Frequencies, log_spaced, zipf_exponent
from torchrec_cafe.profile.head import HotIds
from torchrec_cafe.profile.pieces import Bags, Samples

SMALL = 1 << 17  # bytes of a table: 1024 sampled ids, 256 hot ids


class Trace:
    """Samples in memory, in parts of uneven sizes."""

    name = "trace"

    def __init__(self, ids, days=None, lengths=None):
        self.samples = Samples({"t": Bags(np.asarray(ids), lengths)}, len(ids), days)
        if lengths is not None:
            self.samples = Samples(self.samples.bags, len(lengths), days)
        self.num_samples = self.samples.size

    def parts(self):
        rest, size = self.samples, 7
        while rest.size:
            part, rest = rest.split(min(size, rest.size))
            size = size * 3 % 50_021
            yield part


def profiled(ids, *, days=None, lengths=None, equal=None, **options):
    trace = Trace(ids, days, lengths)
    return profile_trace(trace, TraceOptions(**options), days=equal).statistics["t"]


def exact_shares(ids):
    """By number of rows - 1."""
    counts = sorted(Counter(ids.tolist()).values(), reverse=True)
    return np.cumsum(counts) / len(ids)


TRACES = {
    "zipf": zipf_ids(20_000, 200_000, 1.05, seed=0).numpy(),
    "flat zipf": zipf_ids(20_000, 200_000, 0.7, seed=0).numpy(),
    "uniform": np.random.default_rng(0).integers(0, 20_000, 200_000),
    "all distinct": np.random.default_rng(0).permutation(100_000),
    "one id": np.full(5000, 7),
}


@pytest.mark.parametrize("name", TRACES)
def test_statistics_are_exact_while_all_ids_are_sampled(name):
    ids = TRACES[name]
    found = profiled(ids, batch_size=500)
    assert found.num_lookups == len(ids)
    assert found.num_distinct == len(np.unique(ids))
    assert found.bag_size == 1
    assert found.batch_size == 500
    exact = exact_shares(ids)
    for rows, share in found.coverage:
        assert share == pytest.approx(exact[rows - 1], abs=1e-12)
    assert found.coverage[-1] == (len(np.unique(ids)), 1.0)
    largest = max(len(np.unique(batch)) for batch in in_batches(ids, 500))
    assert found.lookahead_hits[0][0] == largest
    again = 1 - len(np.unique(ids)) / sum(len(np.unique(b)) for b in in_batches(ids, 500))
    assert found.lookahead_hits[-1][1] == pytest.approx(again)
    assert found.lru_hits[-1][1] == pytest.approx(again, abs=0.01)
    assert math.isnan(found.drift_per_day)


@pytest.mark.parametrize("name", TRACES)
def test_statistics_are_within_their_error_when_ids_are_sampled(name):
    """With 1024 sampled ids and 256 hot ones, in bounded memory."""
    ids = TRACES[name]
    found = profiled(ids, batch_size=500, table_bytes=SMALL)
    exact = profiled(ids, batch_size=500)
    # Bottom-k: relative standard error 1 / sqrt(k - 2) = .031; 4 of them.
    assert found.num_distinct == pytest.approx(exact.num_distinct, rel=4 / math.sqrt(1022))
    # Coverage of the head: counts of a sketch with 8 slots for each of its ids, at most the true
    # ones. Of the tail: 1024 ids stand for all, a share p has a standard error of at most
    # sqrt(p (1 - p) / 1024) <= .016 of ids of equal frequency; 4 of them with the rows' error.
    for rows in (1, 10, 100, 256):
        assert found.share_owning(rows) == pytest.approx(exact.share_owning(rows), abs=0.01)
    for rows in (1000, 5000, 10_000, 20_000, 50_000):
        assert found.share_owning(rows) == pytest.approx(exact.share_owning(rows), abs=0.064)
    for rows in (1000, 5000, 10_000):
        assert found.lru_hit_rate(rows) == pytest.approx(exact.lru_hit_rate(rows), abs=0.064)
        ahead = exact.lookahead_hit_rate(rows)
        assert found.lookahead_hit_rate(rows) == pytest.approx(ahead, abs=0.064)


@pytest.mark.parametrize("exponent", [0.7, 1.05, 1.3])
@pytest.mark.parametrize("table_bytes", [SMALL, 32 << 20])
def test_zipf_exponent_is_found(exponent, table_bytes):
    """A million lookups: ranks with ten or more have counts to a third or better."""
    ids = zipf_ids(20_000, 1_000_000, exponent, seed=1).numpy()
    found = profiled(ids, table_bytes=table_bytes)
    assert found.zipf_exponent == pytest.approx(exponent, abs=0.05)


def test_zipf_exponent_of_equal_frequencies_is_zero():
    assert profiled(np.arange(10_000) % 1000).zipf_exponent == pytest.approx(0, abs=1e-9)
    assert math.isnan(profiled(np.full(100, 3)).zipf_exponent)
    assert math.isnan(zipf_exponent(((1, 0.5), (2, 1.0)), 100))


def drifting(num_days, kept, size, seed=0):
    """Days of equal size; of 2000 ids, each day keeps the popularity of a share of them."""
    random = np.random.default_rng(seed)
    of_rank = random.permutation(2000)
    days = []
    for _ in range(num_days):
        days.append(of_rank[zipf_ranks(2000, size, 1.0, random)])
        moved = random.permutation(2000)[: round((1 - kept) * 2000)]
        of_rank = of_rank.copy()
        of_rank[np.sort(moved)] = of_rank[moved]
    return days


@pytest.mark.parametrize("kept", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("table_bytes", [1 << 16, 32 << 20])
def test_drift_is_the_traffic_that_old_hot_ids_lose(kept, table_bytes):
    parts = drifting(4, kept, 100_000)
    days = np.repeat(np.arange(4) + 20_000, 100_000)
    found = profiled(np.concatenate(parts), days=days, batch_size=500, table_bytes=table_bytes)
    tops = [[i for i, _ in Counter(p.tolist()).most_common(found.drift_ids)] for p in parts]
    counts = [Counter(part.tolist()) for part in parts]
    lost = 1 - sum(counts[d][i] for d in (1, 2, 3) for i in tops[d - 1]) / sum(
        counts[d][i] for d in (1, 2, 3) for i in tops[d]
    )
    assert found.drift_ids == pytest.approx(20, abs=2)
    # Exact, but for the sketch's ids that have no slot today: at most a 64th of the lookups each.
    assert found.drift_per_day == pytest.approx(lost, abs=1e-9 if table_bytes > 1 << 16 else 0.03)
    if kept == 1.0:
        assert found.drift_per_day < 0.05


def test_equal_days_are_those_of_a_column():
    parts = drifting(4, 0.5, 5000)
    ids = np.concatenate(parts)
    by_column = profiled(ids, days=np.repeat(np.arange(4), 5000), batch_size=500)
    assert profiled(ids, equal=4, batch_size=500) == by_column
    assert math.isnan(profiled(ids, equal=1, batch_size=500).drift_per_day)


def test_bags_are_counted():
    lengths = np.array([0, 3, 1, 2] * 50)
    ids = np.arange(lengths.sum()) % 7
    found = profiled(ids, lengths=lengths, batch_size=4)
    assert found.bag_size == 1.5
    assert found.num_lookups == 300
    assert found.num_distinct == 7
    assert found.lookahead_hits[0][0] == 6  # a batch has 6 lookups of 7 ids in turn


def test_the_same_trace_gives_the_same_statistics():
    ids = TRACES["zipf"]
    assert profiled(ids, table_bytes=SMALL) == profiled(ids, table_bytes=SMALL)
    other = profiled(ids, table_bytes=SMALL, seed=1)
    assert other.num_distinct != profiled(ids, table_bytes=SMALL).num_distinct


def test_hot_ids_are_never_counted_too_often_and_the_top_ones_exactly():
    ids = zipf_ids(20_000, 200_000, 1.05, seed=2).numpy()
    hot = HotIds(512)
    for part in np.array_split(ids, 10):
        distinct, counts = np.unique(part, return_counts=True)
        hot.add(distinct.astype(np.uint64), counts)
    exact = Counter(ids.tolist())
    found = dict(zip(*(a.tolist() for a in hot.hottest(512)), strict=True))
    assert all(count <= exact[id_] for id_, count in found.items())
    top = [id_ for id_, _ in exact.most_common(50)]
    assert all(found[id_] == exact[id_] for id_ in top)
    assert hot.lookups_of(np.array(top, dtype=np.uint64)) == sum(exact[id_] for id_ in top)
    assert hot.lookups_of(np.array([1 << 40], dtype=np.uint64)) == 0


def test_counts_beyond_float32_lose_its_rounding_only():
    hot = HotIds(16)
    for _ in range(200):
        hot.add(np.array([5], dtype=np.uint64), np.array([1_000_001]))
    assert hot.hottest(1)[1][0] == pytest.approx(200_000_200, rel=200 * 2**-24)


def test_estimated_frequencies_have_all_ids_and_all_lookups():
    frequencies = Frequencies.estimated(np.array([50.0, 30.0]), np.array([2, 1, 1]), 100, 42.0)
    assert frequencies.ids.sum() == pytest.approx(42)
    assert (frequencies.ids * frequencies.lookups).sum() == pytest.approx(100)
    assert frequencies.coverage()[-1] == (42, 1.0)


def test_log_spaced_has_both_ends():
    assert log_spaced(1, 1).tolist() == [1]
    points = log_spaced(3, 1000)
    assert points[0] == 3
    assert points[-1] == 1000
    assert (np.diff(points) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"depth": -1}, "depth must be >= 0, got -1"),
        ({"table_bytes": 1}, "table_bytes must be >= 65536, got 1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TraceOptions(**options)


def test_traces_are_checked():
    with pytest.raises(
        ValueError, match="table 't': ids must be >= 0, got -1 among samples 0 to 3"
    ):
        profiled(np.array([1, -1, 2]))
    with pytest.raises(ValueError, match="trace: there must be samples, got none"):
        profiled(np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="days of a trace must ascend, got day 1 after day 2 at"):
        profiled(np.arange(4), days=np.array([2, 2, 1, 1]), batch_size=2)
    with pytest.raises(ValueError, match="trace: table 't': there must be lookups, got none"):
        profiled(np.array([], dtype=np.int64), lengths=np.array([0, 0]))
    trace = Trace(np.arange(4))
    trace.num_samples = None
    with pytest.raises(ValueError, match="got None samples; give it with --samples"):
        profile_trace(trace, TraceOptions(), days=2)
    with pytest.raises(ValueError, match="there must be lookups"):
        TableProfile(TraceOptions()).statistics()
