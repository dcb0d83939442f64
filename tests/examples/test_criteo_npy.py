"""TorchRec's npy files of Criteo's log; and that no format is ever in memory as a whole."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from examples.dlrm.data import BatchLoader, ClickLog, prepare_criteo
from examples.dlrm.data import criteo as criteo_module
from examples.dlrm.data import criteo_npy as npy_module


def lines(rows: range) -> str:
    made = []
    for row in rows:
        integers = [str(row % 7), "", *["3"] * 11]
        values = [
            f"{row % 3 + 1:08x}",
            "ffffffff",
            *[f"{(row * c) % 50 + 1:08x}" for c in range(24)],
        ]
        made.append("\t".join([str(row % 2), *integers, *values]) + "\n")
    return "".join(made)


def to_npy(text: Path, folder: Path, name: str) -> None:
    """As ``torchrec.datasets.criteo.BinaryCriteoUtils.tsv_to_npys`` does, which needs iopath."""
    folder.mkdir(exist_ok=True)
    rows = [line.split("\t") for line in text.read_text().splitlines()]
    dense = np.array([[int(text or "0") for text in row[1:14]] for row in rows], np.int32)
    dense -= dense.min() - 2
    np.save(folder / f"{name}_dense.npy", np.log(dense, dtype=np.float32))
    sparse = [[int(text or "0", 16) for text in row[14:]] for row in rows]
    np.save(folder / f"{name}_sparse.npy", np.array(sparse, np.int64))
    labels = np.array([int(row[0]) for row in rows], np.int32)
    np.save(folder / f"{name}_labels.npy", labels.reshape(-1, 1))


def prepare(path: Path, cache: Path, buckets: int = 1000) -> ClickLog:
    return prepare_criteo(path, cache, num_embeddings_per_feature=buckets, progress=False)


@pytest.mark.parametrize("block_bytes", [300, 8 << 20])
def test_npy_files_hold_the_log_of_the_text(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(npy_module, "_BLOCK_BYTES", block_bytes)
    for day, rows in ((0, range(30)), (1, range(30, 50)), (10, range(50, 60))):
        (tmp_path / "text").mkdir(exist_ok=True)
        text = tmp_path / "text" / f"day_{day}"
        text.write_text(lines(rows))
        to_npy(text, tmp_path / "npy", f"day_{day}")
    expected = prepare(tmp_path / "text", tmp_path / "cache")
    log = prepare(tmp_path / "npy", tmp_path / "cache")
    assert (len(log.train), len(log.test)) == (50, 10)
    assert log.features == expected.features
    for split, other in ((log.train, expected.train), (log.test, expected.test)):
        assert np.array_equal(split.labels, other.labels)
        assert np.array_equal(split.ids, other.ids)
    dense = np.load(tmp_path / "npy" / "day_10_dense.npy")
    assert np.array_equal(log.test.dense, dense)
    assert "day_0, day_1, day_10" in log.description
    # Kaggle's, and one file of three.
    to_npy(tmp_path / "text" / "day_0", tmp_path / "kaggle", "train")
    for path in (tmp_path / "kaggle", tmp_path / "kaggle" / "train_sparse.npy"):
        log = prepare(path, tmp_path / "cache")
        assert (len(log.train), len(log.test)) == (26, 4)


def test_older_npy_files_have_values_with_a_sign(tmp_path):
    (tmp_path / "text").write_text(lines(range(14)))
    to_npy(tmp_path / "text", tmp_path / "npy", "day_0")
    expected = prepare(tmp_path / "npy", tmp_path / "cache").train.ids.tolist()
    path = tmp_path / "npy" / "day_0_sparse.npy"
    np.save(path, np.load(path).astype(np.uint32).view(np.int32))
    assert prepare(tmp_path / "npy", tmp_path / "cache").train.ids.tolist() == expected


def set_value(array: np.ndarray, index: tuple[int, int], value: float) -> np.ndarray:
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("dense", lambda a: a[:, :12], r"day_0_dense.npy: must be floats of shape \[n, 13\]"),
        ("dense", lambda a: a[:9], r"day_0_sparse.npy: must have as many rows as .* 9, got 20"),
        ("dense", lambda a: set_value(a, (3, 1), np.nan), "day_0_dense.npy, row 3: must be finite"),
        ("sparse", lambda a: a.astype(float), r"must be integers of shape \[n, 26\], got float64"),
        ("labels", lambda a: set_value(a, (7, 0), -1), "row 7: must be 0 or 1, got -1"),
        ("labels", lambda a: np.repeat(a, 2, 1), r"must be integers of shape \[n, 1\]"),
    ],
)
def test_npy_files_that_are_none_of_criteos(tmp_path, part, change, message):
    (tmp_path / "text").write_text(lines(range(20)))
    to_npy(tmp_path / "text", tmp_path / "npy", "day_0")
    path = tmp_path / "npy" / f"day_0_{part}.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "npy", tmp_path / "cache")


def test_npy_files_must_be_whole_and_complete(tmp_path):
    (tmp_path / "text").write_text(lines(range(20)))
    to_npy(tmp_path / "text", tmp_path / "npy", "day_0")
    path = tmp_path / "npy" / "day_0_labels.npy"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"day_0_labels\.npy: must be a complete npy file"):
        prepare(tmp_path / "npy", tmp_path / "cache")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold day_0_labels\.npy beside"):
        prepare(tmp_path / "npy", tmp_path / "cache")


@pytest.mark.parametrize("form", ["text", "gz", "npy"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, form):
    """Neither while a log is prepared nor while batches are read from it."""
    for module in (criteo_module, npy_module):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 15)
    block = lines(range(500))
    peaks = {}
    for copies in (2, 2, 16):  # the first makes what is made once
        folder = tmp_path / f"{form}{copies}"
        folder.mkdir(exist_ok=True)
        text = folder / "train.txt"
        text.write_text(block * copies)
        if form == "npy":
            to_npy(text, folder, "train")
            text.unlink()
        elif form == "gz":
            (folder / "train.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
            text.unlink()
        tracemalloc.start()
        log = prepare(folder, tmp_path / f"cache{copies}{len(peaks)}", buckets=100)
        for batch in BatchLoader(log.train, log.features, batch_size=64, drop_last=True):
            assert len(batch.labels) == 64
        peaks[copies] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = 157 * len(log.train)
    assert peaks[16] < 1.1 * peaks[2]
    assert peaks[16] < size
