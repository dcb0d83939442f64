"""What a budget catches: against counting by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cafe.config import Cafe, IdStatistics, Lookahead, TableShape
from torchrec_cafe.profile.costs import (
    cache_cost,
    compression_cost,
    parse_cache_size,
    shapes_of,
    split_hot_rows,
)


def statistics(coverage, num_lookups, **fields):
    return IdStatistics(
        num_lookups=num_lookups,
        num_distinct=coverage[-1][0],
        bag_size=1.0,
        batch_size=10,
        zipf_exponent=1.0,
        drift_per_day=math.nan,
        drift_ids=1,
        coverage=coverage,
        lru_hits=fields.get("lru_hits", ((32, 0.5),)),
        lookahead_hits=fields.get("lookahead_hits", ((100, 0.6), (1000, 0.9))),
    )


BIG = statistics(((1, 0.5), (10, 0.8), (100, 0.9), (1000, 1.0)), 1000)
SMALL = statistics(((1, 0.4), (4, 1.0)), 100)


def test_hot_rows_go_to_the_ids_with_the_most_lookups():
    # Lookups a row: BIG 500, 33.3 (9 rows), 1.1 (90), 0.1; SMALL 40, 20 (3 rows).
    tables = {"big": BIG, "small": SMALL}
    assert split_hot_rows(tables, 2) == {"big": 1, "small": 1}
    assert split_hot_rows(tables, 11) == {"big": 10, "small": 1}
    assert split_hot_rows(tables, 14) == {"big": 10, "small": 4}
    assert split_hot_rows(tables, 5000) == {"big": 1000, "small": 4}


@given(st.integers(0, 3000))
def test_hot_rows_are_given_once(hot_rows):
    rows = split_hot_rows({"big": BIG, "small": SMALL}, hot_rows)
    assert sum(rows.values()) == min(hot_rows, 1004)


def test_compression_follows_the_allocation_of_cafe():
    shapes = {
        "big": TableShape(name="big", num_embeddings=1_000_000, embedding_dim=16),
        "small": TableShape(name="small", num_embeddings=4, embedding_dim=16),
        "other dim": TableShape(name="other dim", num_embeddings=500_000, embedding_dim=32),
    }
    tables = {"big": BIG, "small": SMALL, "other dim": BIG}
    cost = compression_cost(tables, shapes, 1000)
    pair = Cafe(compression=1000).allocate([shapes["big"], shapes["small"]])
    alone = Cafe(compression=1000).allocate([shapes["other dim"]])
    assert cost.resident_bytes == pair.memory.total_bytes + alone.memory.total_bytes
    assert list(cost.owning) == list(tables)
    assert cost.owning["small"].is_whole
    assert cost.owning["small"].share == 1
    hot_rows = pair.num_shards * pair.hot_rows_per_shard
    assert cost.owning["big"].rows == hot_rows
    assert cost.owning["big"].share == BIG.share_owning(hot_rows)
    assert not cost.owning["big"].is_whole


def test_compression_that_is_refused_says_which_works():
    shapes = {"big": TableShape(name="big", num_embeddings=1000, embedding_dim=16)}
    cost = compression_cost({"big": BIG}, shapes, 10_000)
    assert not cost.owning
    assert "leaves no row for table 'big'" in cost.refused
    assert "the largest compression that works" in cost.refused


def test_cache_costs_its_slots_and_its_map():
    shape = TableShape(name="big", num_embeddings=20_000, embedding_dim=16)
    cost = cache_cost(BIG, shape, "5%")
    kind = Lookahead(cache_fraction=0.05, min_slots=1)
    assert cost.rows == 1000
    assert cost.num_bytes == kind.allocate([shape]).memory.total_bytes
    assert (cost.lru, cost.lookahead) == (0.5, 0.9)
    assert cache_cost(BIG, shape, "99").lookahead is None  # less than the largest batch
    tiny = TableShape(name="tiny", num_embeddings=50, embedding_dim=16)
    assert cache_cost(BIG, tiny, "100%").lookahead == 0.6  # all rows, whatever the batch


def test_cache_sizes_are_shares_or_rows():
    assert parse_cache_size("5%", 1000) == 50
    assert parse_cache_size("0.5", 1000) == 500
    assert parse_cache_size("100%", 7) == 7
    assert parse_cache_size("1.0", 7) == 7
    assert parse_cache_size("20", 1000) == 20
    assert parse_cache_size("2000", 1000) == 1000
    assert parse_cache_size("0.1%", 10) == 1
    for size in ("0", "-1", "0%", "101%", "1.5", "a", "nan%", ""):
        with pytest.raises(ValueError, match=f"must be a share .* or rows >= 1, got '{size}'"):
            parse_cache_size(size, 1000)


def test_tables_have_rows_for_their_ids():
    shapes = shapes_of({"a": 9, "b": 9}, {"b": 100}, {"a": 8, "b": 16}, {"a": 4, "b": 2})
    assert shapes["a"].num_embeddings == 10
    assert shapes["b"].num_embeddings == 100
    assert shapes["b"].row_bytes == 32
    with pytest.raises(ValueError, match="table 'a': ids must be below num_embeddings=9, got 9"):
        shapes_of({"a": 9}, {"a": 9}, {"a": 8}, {"a": 4})
