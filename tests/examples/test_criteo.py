"""Criteo's published formats, well-formed and not."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from examples.dlrm.data import BatchLoader, ClickLog, FeatureSpec, load_click_log, prepare_criteo
from examples.dlrm.data import criteo as criteo_module


def criteo_line(row: int) -> str:
    integers = [str(row), "-2", "", *["3"] * 10]
    values = [f"{row % 3:08x}", "", "ffffffff", "0A", *["68fd1e64"] * 22]
    return "\t".join([str(row % 2), *integers, *values])


def write_lines(path: Path, rows: range) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(criteo_line(row) + "\n" for row in rows))
    return path


def load_criteo(source: Path, cache: Path, buckets: int | None = 1000) -> ClickLog:
    return load_click_log(
        str(source), cache_dir=cache, num_embeddings_per_feature=buckets, progress=False
    )


@pytest.mark.parametrize("block_bytes", [50, 1000, 8 << 20])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "no last newline", "gz"])
def test_criteo_file(tmp_path, monkeypatch, block_bytes, ending):
    monkeypatch.setattr(criteo_module, "_BLOCK_BYTES", block_bytes)
    text = write_lines(tmp_path / "train.txt", range(21)).read_bytes()
    source = tmp_path / ("train.txt.gz" if ending == "gz" else "train.txt")
    if ending == "\r\n":
        source.write_bytes(text.replace(b"\n", b"\r\n"))
    elif ending == "gz":
        source.write_bytes(gzip.compress(text))
    else:
        source.write_bytes(text if ending == "\n" else text[:-1])
    log = load_criteo(source, tmp_path / "cache")
    assert (len(log.train), len(log.test)) == (18, 3)
    assert (log.num_dense, len(log.features)) == (13, 26)
    assert [f.num_embeddings for f in log.features] == [3, *[1] * 25]
    assert log.train.labels.tolist() == [row % 2 for row in range(18)]
    assert log.train.ids[:, 0].tolist() == [row % 3 for row in range(18)]
    expected = np.log1p([18, 0, 0, *[3] * 10]).astype(np.float32)
    np.testing.assert_allclose(log.test.dense[0], expected, rtol=1e-6)
    assert isinstance(log.train.ids, np.memmap)
    assert len(list(BatchLoader(log.train, log.features, batch_size=4, drop_last=False))) == 5


def test_criteo_values_are_hashed_and_missing_is_its_own_id(tmp_path):
    lines = []
    for text in ["", "00000000", "00000009", "00000005", ""]:
        lines.append("\t".join(["0", *[""] * 13, text, *[""] * 25]))
    source = tmp_path / "train.txt"
    source.write_text("\n".join(lines))
    log = load_criteo(source, tmp_path / "cache", buckets=10)
    ids = np.concatenate([log.train.ids[:, 0], log.test.ids[:, 0]])
    assert ids.tolist() == [0, 1, 1, 2, 0]  # buckets 0, 1 + 0, 1 + 9 % 9, 1 + 5, 0
    assert log.features[0] == FeatureSpec("cat_0", 3)


def test_criteo_folder_tests_on_the_last_day(tmp_path):
    folder = tmp_path / "days"
    for day, rows in [(10, range(25, 30)), (9, range(20, 25)), (2, range(20))]:
        write_lines(folder / f"day_{day}", rows)
    log = load_criteo(folder, tmp_path / "cache")
    assert (len(log.train), len(log.test)) == (25, 5)
    expected = np.log1p(np.arange(25)).astype(np.float32)
    np.testing.assert_allclose(log.train.dense[:, 0], expected, rtol=1e-6)


def test_criteo_is_prepared_again_only_when_it_changed(tmp_path):
    source = write_lines(tmp_path / "train.txt", range(14))
    cache = tmp_path / "cache"

    def prepared() -> int:
        load_criteo(source, cache)
        return sum(folder.is_dir() for folder in cache.iterdir())

    assert prepared() == prepared() == 1
    load_criteo(source, cache, buckets=7)
    assert prepared() == 2
    write_lines(source, range(15))
    assert prepared() == 3


def replace_column(line: str, column: int, text: str) -> str:
    columns = line.split("\t")
    columns[column - 1] = text
    return "\t".join(columns)


@pytest.mark.parametrize("block_bytes", [50, 8 << 20])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.rpartition("\t")[0], r"must have 40 columns .* got 39"),
        (lambda line: line + "\t1", r"must have 40 columns .* got 41"),
        (lambda line: "", r"must have 40 columns .* got 1"),
        (lambda line: replace_column(line, 1, "2"), "column 1 must be 0 or 1, got '2'"),
        (lambda line: replace_column(line, 1, ""), "column 1 must be 0 or 1, got ''"),
        (lambda line: replace_column(line, 1, "-1"), "column 1 must be 0 or 1, got '-1'"),
        (lambda line: replace_column(line, 3, "x1"), "column 3 must be an integer .* got 'x1'"),
        (lambda line: replace_column(line, 3, "-"), "column 3 must be an integer .* got '-'"),
        (lambda line: replace_column(line, 3, "1.5"), "column 3 must be an integer .* got '1.5'"),
        (lambda line: replace_column(line, 14, "9" * 19), "column 14 must be an integer"),
        (lambda line: replace_column(line, 15, "5g"), "column 15 must be 1 to 8 hex .* got '5g'"),
        (lambda line: replace_column(line, 40, "é"), "column 40 must be 1 to 8 hex .* got 'é'"),
        (lambda line: replace_column(line, 40, "123456789"), "column 40 must be 1 to 8 hex"),
    ],
)
def test_criteo_malformed_row(tmp_path, monkeypatch, block_bytes, change, message):
    monkeypatch.setattr(criteo_module, "_BLOCK_BYTES", block_bytes)
    lines = [criteo_line(row) for row in range(20)]
    lines[12] = change(lines[12])
    source = tmp_path / "train.txt"
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"train\.txt, line 13: {message}"):
        load_criteo(source, tmp_path / "cache")
    assert all(file.suffix == ".lock" for file in (tmp_path / "cache").iterdir())


def test_criteo_unusable_files(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match="nowhere.*does not exist"):
        prepare_criteo(tmp_path / "nowhere", cache)
    with pytest.raises(ValueError, match="`source` must be 'promotions', .*nowhere"):
        load_criteo(tmp_path / "nowhere", cache)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="must hold train.txt or day_0"):
        load_criteo(folder, cache)
    with pytest.raises(ValueError, match="`num_embeddings_per_feature` must be between 2"):
        load_criteo(folder, cache, buckets=1)
    assert not cache.exists()
    (folder / "day_0").touch()
    with pytest.raises(ValueError, match="day_0: must hold rows, got an empty file"):
        load_criteo(folder, cache)
    (folder / "day_0").write_bytes(b"1" * 100_000)
    with pytest.raises(ValueError, match="day_0, line 1: must be at most 65536 bytes"):
        load_criteo(folder, cache)
    (folder / "day_0").unlink()
    (folder / "day_0.gz").write_bytes(gzip.compress(bytes(range(256)) * 99)[:-20])
    with pytest.raises(ValueError, match=r"day_0\.gz: must be a complete gzip file"):
        load_criteo(folder, cache)
    assert all(file.suffix == ".lock" for file in cache.iterdir())
