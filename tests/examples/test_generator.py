"""The generator: the same every time, skewed, learnable, and drifting where it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from examples.dlrm.data import load_click_log, prepare_generated
from examples.dlrm.data.generator import (
    NUM_DAYS,
    NUM_EMBEDDINGS,
    draw_rows,
    write_generated,
)
from examples.dlrm.data.storage import open_click_log

#: the cardinalities, a hundredth of them
SMALL = tuple(-(-size // 100) for size in NUM_EMBEDDINGS)


def draw(rows: int, sizes: tuple[int, ...], reshuffled: float = 0.0):
    """Ids, logits and labels; every day has as many rows."""
    random = np.random.default_rng(0)
    ids = np.empty((rows, len(sizes)), np.int32)
    days = np.arange(rows) * NUM_DAYS // rows
    _, logit = draw_rows(ids, days, sizes, reshuffled=reshuffled, random=random)
    return ids, logit, random.random(rows) < 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize("reshuffled", [0.0, 0.3])
def test_the_same_seed_generates_the_same_log(tmp_path: Path, reshuffled: float):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        write_generated(
            tmp_path / name, 300, 50, num_embeddings=(40, 7), reshuffled=reshuffled, seed=seed
        )
    for part in ("ids", "dense", "labels"):
        first, again, other = (np.load(tmp_path / name / f"{part}.npy") for name in "abc")
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
    log = open_click_log(tmp_path / "a")
    assert (len(log.train), len(log.test), log.num_dense) == (300, 50, 13)
    assert [feature.num_embeddings for feature in log.features] == [40, 7]
    assert (log.train.ids < [40, 7]).all()
    assert log.name == ("generator_drift" if reshuffled else "generator")
    assert "not real data" in log.description


def test_popularity_is_zipf_distributed():
    ids, _, _ = draw(200_000, (1000, 100_000))
    for column, size, exponent in ((0, 1000, 1.05), (1, 100_000, 1.1)):
        expected = np.arange(1, size + 1) ** -exponent
        expected /= expected.sum()
        counts = np.sort(np.bincount(ids[:, column], minlength=size))[::-1] / len(ids)
        np.testing.assert_allclose(counts[:20], expected[:20], rtol=0.15)
        # The popular ids are anywhere.
        popular = np.argsort(np.bincount(ids[:, column], minlength=size))[-100:]
        assert 0.2 < popular.mean() / size < 0.8


def test_labels_can_be_told_about_as_well_as_criteos():
    _, logit, clicked = draw(50_000, SMALL)
    best = binary_auroc(torch.from_numpy(logit).sigmoid(), torch.from_numpy(clicked).int())
    assert 0.73 < float(best) < 0.85
    assert 0.1 < clicked.mean() < 0.4


def test_ids_swap_popularity_every_day_and_keep_what_they_tell():
    def top(ids: np.ndarray, day: int) -> set[int]:
        column = ids[day * 20_000 : (day + 1) * 20_000, 0]
        return set(np.argsort(np.bincount(column, minlength=5000))[-50:].tolist())

    still, _, _ = draw(200_000, (5000,))
    drifting, _, _ = draw(200_000, (5000,), reshuffled=0.3)
    for day in range(NUM_DAYS - 1):
        assert len(top(still, day) & top(still, day + 1)) > 38
        assert 20 <= len(top(drifting, day) & top(drifting, day + 1)) <= 44
    assert len(top(still, 0) & top(still, 9)) > 38
    assert len(top(drifting, 0) & top(drifting, 9)) < 15


def test_test_rows_follow_on_the_last_day(tmp_path: Path):
    write_generated(tmp_path, 100_000, 10_000, num_embeddings=(50,), reshuffled=1.0)
    log = open_click_log(tmp_path)

    def shares(ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids[:, 0], minlength=50) / len(ids)

    test, last = shares(log.test.ids), shares(log.train.ids[90_000:])
    before = shares(log.train.ids[80_000:90_000])
    assert np.abs(test - last).sum() < 0.15
    assert np.abs(test - before).sum() > 0.4


def test_generated_logs_are_kept_and_named(tmp_path: Path):
    with pytest.raises(ValueError, match="`name` must be of generator, generator_drift, got 'x'"):
        prepare_generated(tmp_path, "x")
    folder = tmp_path / "generator-v1"
    folder.mkdir()
    write_generated(folder, 200, 20, num_embeddings=(5,))
    log = load_click_log("generator", cache_dir=tmp_path)
    assert len(log.train) == 200
    with pytest.raises(ValueError, match="must be None for 'generator'"):
        load_click_log("generator", cache_dir=tmp_path, num_embeddings_per_feature=9)
