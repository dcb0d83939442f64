"""All benchmarks in one go: what has finished stays, what has not is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, run
from benchmarks.train_step_data import Case, parse_cases


def go(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cpu", "--quick"]
    command += ["--parts", "kernels", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_that_had_no_time_goes_on(tmp_path: Path):
    ended = go(tmp_path, "--minutes", "0")
    assert ended.returncode == 1
    assert "kernels: not begun: the time was up" in ended.stdout
    assert go(tmp_path).returncode == 0
    measured = (tmp_path / "kernels.json").stat().st_mtime_ns
    done = go(tmp_path, "--results", str(tmp_path / "results"), "--hardware", "mine")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernels.json").stat().st_mtime_ns == measured
    (path,) = (tmp_path / "results").glob("cpu_mine_*.json")
    report = json.loads(path.read_text())
    names = {row["name"] for row in report["rows"]}
    assert {"6,656 ids/remap over copy", "133,120 ids/learn over copy"} <= names
    assert report["missing"] == {}
    assert "| 6,656 ids/remap over copy |" in path.with_suffix(".md").read_text()


def test_what_fails_is_named(tmp_path: Path):
    runner = run.Runner(tmp_path, 1.0)
    runner.run(run.Part("wrong", ("kernels", "--no-such-option"), 1.0))
    runner.run(run.Part("late", ("kernels", "--quick"), 0.001))
    assert runner.missing == {
        "wrong": "failed with status 2, see wrong.log",
        "late": "ended after 0 s",
    }
    assert run.collect(tmp_path, ["wrong", "late"]) == []


def test_operators_are_held_against_their_definitions():
    kernels.check(torch.device("cpu"))


def test_cases_are_read():
    assert parse_cases("16:2048,64:8:20") == (Case(16, 2048), Case(64, 8, 20))
    for wrong in ("16", "16:a", "18:8", "16:8:0", ""):
        with pytest.raises(ValueError, match="--cases must be"):
            parse_cases(wrong)
    given = {part.command[0] for part in run.parts("cuda", Path("out"), quick=False)}
    assert given == {"kernels", "train_step", "lookahead_cuda"}
