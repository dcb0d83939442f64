"""``torchrec-cafe plan``: real files, the real planner, no GPU."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

import torchrec_cafe as tc
from torchrec_cafe.config import IdStatistics, save_statistics
from torchrec_cafe.planning import command
from torchrec_cafe.planning.tables_file import read_tables

TABLES = """
tables:
  - {name: t_user, num_embeddings: 40_000_000, embedding_dim: 64, bag_size: 2.5, features: 2}
  - {name: t_ad, count: 3, num_embeddings: 300_000, embedding_dim: 32, data_type: FP16,
     pooling: mean}
  - name: t_page
    num_embeddings: 9_000_000
    embedding_dim: 64
    table: {kind: Cafe, compression: 100}
    sharding_types: [table_row_wise]
"""


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    path = tmp_path / "tables.yaml"
    path.write_text(TABLES)
    return path


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["plan", *arguments])
    return args.run(args)


def test_a_file_says_what_tables_are(tables: Path):
    read = read_tables(tables)
    configs = {config.name: config for config in read.module.embedding_bag_configs()}
    assert list(configs) == ["t_user", "t_ad_0", "t_ad_1", "t_ad_2", "t_page"]
    assert configs["t_user"].feature_names == ["t_user/0", "t_user/1"]
    assert read.constraints["t_user"].pooling_factors == [2.5, 2.5]
    assert read.constraints["t_ad_0"].pooling_factors == [1.0]
    assert str(configs["t_ad_1"].data_type) == "FP16"
    assert configs["t_ad_1"].pooling.value == "MEAN"
    assert read.constraints["t_page"].table == tc.Cafe(compression=100)
    assert read.constraints["t_page"].sharding_types == ["table_row_wise"]
    assert next(read.module.parameters()).is_meta


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tables: 3", "must be a list of tables"),
        ("[", "must be YAML"),
        ("- 5", "table 0: must be a mapping, got 5"),
        ("- {name: t, num_embeddings: 5}", "embedding_dim must be given as int, got None"),
        ("- {name: t, num_embeddings: 0, embedding_dim: 8}", "num_embeddings must be > 0, got 0"),
        ("- {name: t, num_embeddings: 5, embedding_dim: 8, rows: 3}", r"unknown fields \['rows'\]"),
        (
            "- {name: t, num_embeddings: 5, embedding_dim: 8, data_type: INT8}",
            r"data_type must be one of \['FP32', 'FP16'\], got 'INT8'",
        ),
        (
            "- {name: t, num_embeddings: 5, embedding_dim: 8, table: {kind: Zip}}",
            "table.kind must be one of .*, got 'Zip'",
        ),
        (
            "- {name: t, num_embeddings: 5, embedding_dim: 8, table: {kind: Cafe, ratio: 3}}",
            r"Cafe has no arguments \['ratio'\]",
        ),
        (
            "- {name: t, num_embeddings: 5, embedding_dim: 8, table: {kind: Cafe, compression: 0}}",
            "compression must be a finite number >= 1, got 0",
        ),
        (
            "- {name: t, num_embeddings: 5, embedding_dim: 8, sharding_types: [rowwise]}",
            r"sharding_types must be of \['data_parallel', .*got \['rowwise'\]",
        ),
        (
            "- {name: t, num_embeddings: 5, embedding_dim: 8}\n"
            "- {name: t, num_embeddings: 5, embedding_dim: 8}",
            "table 1: the name 't' is taken by another table",
        ),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, text: str, message: str):
    path = tmp_path / "tables.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tables(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("512", 512), ("2tib", 2**41), ("3kB", 3000)],
)
def test_sizes(text: str, size: int):
    assert command.size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "80XB", "1..2GB", "0"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size such as 80GB"):
        command.size_in_bytes(text)


def test_a_plan_is_printed(tables: Path, capsys: pytest.CaptureFixture[str]):
    where = ("--tables", str(tables), "--world-size", "16", "--hbm", "1GB", "--ddr", "2GB")
    assert run(*where) == 0
    text = capsys.readouterr().out
    assert re.search(r"t_page +Cafe\(compression=100\) +table_row_wise", text)
    assert "5 tables: " in text
    assert run(*where, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["table"] for row in values["rows"]][0] == "t_user"
    assert len(values["device_bytes_of_ranks"]) == 16
    assert values["rows"][-1]["ranks"] in ("0-7", "8-15")
    assert max(values["device_bytes_of_ranks"]) < 10**9


def test_statistics_and_options_reach_the_planner(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    statistics = IdStatistics(
        num_lookups=10**9,
        num_distinct=4e7,
        bag_size=3.0,
        batch_size=2048,
        zipf_exponent=1.0,
        drift_per_day=0.1,
        drift_ids=10,
        coverage=((1, 0.1), (10_000, 0.8), (4_000_000, 0.95), (40_000_000, 1.0)),
        lru_hits=(),
        lookahead_hits=(),
    )
    save_statistics(tmp_path / "statistics.json", {"t_user": statistics})
    small = ("--tables", str(tables), "--world-size", "8", "--hbm", "0.2GB", "--ddr", "100MB")
    options = ("--statistics", str(tmp_path / "statistics.json"), "--allow", "Cafe", "--json")
    assert run(*small, *options) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["kept"].startswith("Cafe(compression=")
    assert 0 < row["risk"] < 0.2
    assert run(*small, *options, "--max-compression", "2") == 1
    assert "max_compression than 2" in capsys.readouterr().err


def test_tables_as_they_are(tables: Path, capsys: pytest.CaptureFixture[str]):
    where = ("--tables", str(tables), "--world-size", "8", "--ddr", "100GB", "--device", "cpu")
    assert run(*where, "--fixed", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["kept"].split("(")[0] for row in rows[-2:]] == ["fused", "Cafe"]
    assert all(row["why"] == "" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world-size", "0", "--hbm", "1GB"), "--world-size must be >= 1, got 0"),
        (("--world-size", "2"), "--hbm must be given for --device cuda"),
        (("--world-size", "2", "--device", "cpu"), "--ddr must be given for --device cpu"),
        (("--world-size", "6", "--hbm", "1GB", "--local-world-size", "4"), "must divide"),
        (("--world-size", "2", "--hbm", "1GB", "--allow", "Zip"), "--allow must be of .*'Zip'"),
        (("--world-size", "2", "--hbm", "1GB", "--reserve", "1"), r"--reserve must be in \[0, 1\)"),
        (("--world-size", "2", "--hbm", "1GB", "--statistics", "no.json"), "no.json"),
        (("--world-size", "2", "--hbm", "1GB", "--path", "/nvme"), "--path must be left out"),
    ],
)
def test_arguments_that_cannot_be(
    tables: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
):
    assert run("--tables", str(tables), *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_does_not_fit_says_what_is_missing(tables: Path, capsys: pytest.CaptureFixture[str]):
    where = ("--tables", str(tables), "--world-size", "2", "--hbm", "2MB", "--ddr", "1MB")
    assert run(*where) == 1
    assert "it takes more memory" in capsys.readouterr().err
