"""Which rows and which ids have changed since when."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cafe.ops import HotRows, PoolRows, SketchState, observe, rebalance, remap
from torchrec_cafe.tables import IdCounts
from torchrec_cafe.tables.touched import TouchedBuckets, TouchedRows, hot_keys, of_lookups

TABLES = torch.tensor([[1000, 40, 0, 0, 0]])


def _batches(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(200, generator=generator) ** 3 * 1000).long() for _ in range(count)]


def _learn(sketch: SketchState, ids: torch.Tensor) -> None:
    found = _rows(sketch.buckets, ids)
    observe(sketch, found.keys, found.shards, torch.rand(len(ids)), growth=2.0)
    rebalance(sketch, torch.arange(4), num_medium=6)


def _rows(buckets: torch.Tensor, ids: torch.Tensor):
    pool = PoolRows(offset=40, hot_rows_per_shard=5, second_rows_per_shard=2)
    hot = HotRows(buckets=buckets, first_shard=0, num_shards=4, rows=pool)
    return remap(ids, torch.tensor([0, len(ids)]), TABLES, hot)


@given(st.integers(0, 2**31), st.integers(0, 6), st.data())
def test_changes_of_the_map(seed: int, steps: int, data: st.DataObject):
    """Changed buckets turn an old map into the new one, and hot ids are told apart."""
    torch.manual_seed(seed)
    sketch = SketchState.empty(shards=4, buckets=6, hot_rows=5)
    followed = TouchedBuckets(sketch.buckets)
    maps = [followed.known.clone()]
    for version, ids in enumerate(_batches(seed, steps), 1):
        _learn(sketch, ids)
        followed.update(sketch.buckets, version)
        maps.append(followed.known.clone())
    everything = torch.arange(1000)
    for mine, theirs in zip(
        _rows(maps[-1], everything), _rows(sketch.buckets, everything), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert torch.equal(of_lookups(maps[-1]), maps[-1])
    since = data.draw(st.integers(0, steps))
    old = maps[since].flatten(0, 1).clone()
    changed = followed.since(since)
    old[changed] = maps[-1].flatten(0, 1)[changed]
    assert torch.equal(old, maps[-1].flatten(0, 1))
    before, after = set(hot_keys(maps[since]).tolist()), set(hot_keys(maps[-1]).tolist())
    became, stopped = followed.hot_since(since)
    assert set(became.tolist()) == after - before
    assert set(stopped.tolist()) == before - after


def test_rows_by_version():
    touched = TouchedRows(6, torch.device("cpu"))
    touched.mark(torch.tensor([1, 1, 4]))
    touched.version = 2
    touched.mark(torch.tensor([4, 0]))
    assert touched.since(0).tolist() == [0, 1, 4]
    assert touched.since(1).tolist() == [0, 4]
    assert touched.since(2).tolist() == []


@given(st.lists(st.integers(0, 30), max_size=50), st.integers(0, 20), st.integers(0, 20))
def test_counts_of_ids(ids: list[int], begin: int, size: int):
    counts = IdCounts.of(torch.tensor(ids, dtype=torch.int32), uncounted=0.25)
    expected = [float(ids.count(i)) or 0.25 for i in range(begin, begin + size)]
    assert counts.weights(begin, begin + size).tolist() == expected
    twice = IdCounts.of(counts.ids, 2 * counts.counts)
    assert twice.counts.tolist() == [2 * count for count in counts.counts.tolist()]


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([2, 1], [1.0, 1.0], "IdCounts: `ids` must be distinct and ascend"),
        ([1, 2], [1.0], "IdCounts: `ids` and `counts` must have the same shape"),
        ([1, 2], [1.0, 0.0], "IdCounts: `counts` must be > 0 and finite"),
        ([1, 2], [1.0, float("nan")], "IdCounts: `counts` must be > 0 and finite"),
    ],
)
def test_counts_are_checked(ids: list[int], counts: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        IdCounts(ids=torch.tensor(ids), counts=torch.tensor(counts, dtype=torch.float64))
    with pytest.raises(TypeError, match="IdCounts: `ids` must be torch.int64"):
        IdCounts(ids=torch.tensor(ids).int(), counts=torch.tensor(counts, dtype=torch.float64))
    with pytest.raises(ValueError, match="IdCounts: `uncounted` must be > 0 and finite, got 0"):
        IdCounts.of(torch.tensor([1]), uncounted=0)
