"""The statistics of a table's ids, and the file they are kept in."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torchrec_cafe as tc
from torchrec_cafe.config import IdStatistics

STATISTICS = IdStatistics(
    num_lookups=1000,
    num_distinct=100.5,
    bag_size=1.5,
    batch_size=64,
    zipf_exponent=1.05,
    drift_per_day=0.25,
    drift_ids=2,
    coverage=((1, 0.2), (10, 0.6), (100, 1.0)),
    lru_hits=((32, 0.1), (320, 0.5)),
    lookahead_hits=((64, 0.3), (640, 0.7)),
)


def changed(**fields):
    return dataclasses.replace(STATISTICS, **fields)


def test_coverage_is_linear_in_the_logarithm_of_the_rows():
    assert STATISTICS.share_owning(0) == STATISTICS.share_owning(0.99) == 0
    assert STATISTICS.share_owning(1) == 0.2
    assert STATISTICS.share_owning(10**0.5) == pytest.approx(0.4)
    assert STATISTICS.share_owning(10) == pytest.approx(0.6)
    assert STATISTICS.share_owning(100) == STATISTICS.share_owning(1e9) == 1
    assert STATISTICS.share_owning(math.nan) == 0


def test_hit_rates_are_zero_below_the_smallest_cache():
    assert STATISTICS.lru_hit_rate(31) == 0
    assert STATISTICS.lru_hit_rate(32) == 0.1
    assert STATISTICS.lru_hit_rate(32 * 10**0.5) == pytest.approx(0.3)
    assert STATISTICS.lookahead_hit_rate(63) == 0
    assert STATISTICS.lookahead_hit_rate(1e6) == 0.7
    assert changed(lru_hits=()).lru_hit_rate(100) == 0


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_shares_ascend(few, many):
    few, many = sorted((few, many))
    assert 0 <= STATISTICS.share_owning(few) <= STATISTICS.share_owning(many) <= 1


def test_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "statistics.json"
    tables = {"a": STATISTICS, "b b": changed(lru_hits=())}
    tc.save_statistics(path, tables)
    assert tc.load_statistics(path) == tables
    tc.save_statistics(path, {"a": changed(drift_per_day=math.nan, zipf_exponent=math.nan)})
    loaded = tc.load_statistics(path)["a"]
    assert math.isnan(loaded.drift_per_day)
    assert math.isnan(loaded.zipf_exponent)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_lookups": 0}, ValueError, "field 'num_lookups' must be >= 1, got 0"),
        ({"num_lookups": 1.5}, TypeError, "field 'num_lookups' must be an integer, got 1.5"),
        ({"batch_size": True}, TypeError, "field 'batch_size' must be an integer, got True"),
        ({"drift_ids": -1}, ValueError, "field 'drift_ids' must be >= 0, got -1"),
        ({"num_distinct": 0.5}, ValueError, "field 'num_distinct' must be finite and >= 1"),
        ({"num_distinct": "7"}, TypeError, "field 'num_distinct' must be a number, got '7'"),
        ({"bag_size": 0.0}, ValueError, "field 'bag_size' must be finite and > 0, got 0.0"),
        ({"zipf_exponent": math.inf}, ValueError, "field 'zipf_exponent' must be finite or nan"),
        ({"drift_per_day": 1.5}, ValueError, r"must be in \[0, 1\] or nan, got 1.5"),
        ({"coverage": [[1, 1.0]]}, TypeError, r"'coverage' must be a tuple of \(rows, share\)"),
        ({"coverage": ()}, ValueError, r"'coverage' must end with a share of 1, got \(\)"),
        ({"coverage": ((1, 0.5),)}, ValueError, "must end with a share of 1, got"),
        ({"lru_hits": ((2, 0.5), (2, 0.6))}, ValueError, "'lru_hits' must have ascending rows"),
        ({"lru_hits": ((2, 0.5), (3, 0.4))}, ValueError, "'lru_hits' must have ascending rows"),
        ({"lookahead_hits": ((0, 0.5),)}, ValueError, "must have rows >= 1 and shares in"),
        ({"lookahead_hits": ((1, 1.5),)}, ValueError, "must have rows >= 1 and shares in"),
    ],
)
def test_fields_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        changed(**fields)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.pop("tables"), ValueError, "must be a file of `save_statistics`"),
        (lambda c: c.update(version=0), ValueError, "version must be 1, got 0; write it anew"),
        (lambda c: c["tables"].update(a=3), TypeError, "table 'a': the statistics must be a map"),
        (
            lambda c: c["tables"]["a"].pop("bag_size"),
            ValueError,
            "table 'a': field 'bag_size' must be there, got",
        ),
        (
            lambda c: c["tables"]["a"].update(extra=1),
            ValueError,
            "table 'a': fields must be among .*, got 'extra'",
        ),
        (
            lambda c: c["tables"]["a"].update(coverage=7),
            TypeError,
            "table 'a': field 'coverage' must be a list of .*, got 7",
        ),
        (
            lambda c: c["tables"]["a"].update(num_lookups=-1),
            ValueError,
            "table 'a': field 'num_lookups' must be >= 1, got -1",
        ),
    ],
)
def test_file_is_checked(tmp_path, change, error, message):
    path = tmp_path / "statistics.json"
    tc.save_statistics(path, {"a": STATISTICS})
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(error, match=f"{path.name}: {message}"):
        tc.load_statistics(path)


def test_file_must_be_json(tmp_path):
    path = tmp_path / "statistics.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="statistics.json: must be a JSON file of"):
        tc.load_statistics(path)
    with pytest.raises(FileNotFoundError):
        tc.load_statistics(tmp_path / "none.json")
