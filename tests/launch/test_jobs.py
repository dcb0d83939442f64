"""Jobs that TorchX starts on this machine: two nodes that meet, evaluation."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.examples.test_train import criteo_file  # noqa: F401  a fixture
from tests.launch.torchx import torchx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _job(component: str, *arguments: str, succeeds: bool = True) -> str:
    done = torchx("run", "-s", "local_cwd", component, *arguments)
    assert (done.returncode == 0) is succeeds, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _values(path: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in json.loads(path.read_text())["rows"]}


def test_two_nodes_meet_and_one_evaluates_what_they_save(
    tmp_path: Path,
    criteo_file: Path,  # noqa: F811
):
    flags = (
        *("--", "--data", str(criteo_file), "--full", "--kinds", "cafe", "--compression", "4"),
        *("--max_steps", "20"),
        *("--batch_size", "64", "--learning_rate", "0.2", "--cache_dir", str(tmp_path / "cache")),
        *("--checkpoint_dir", str(tmp_path / "checkpoints"), "--out", str(tmp_path / "out")),
    )
    # Two agents, which find each other at the port, as those of two machines do.
    shown = _job("cafe.dlrm.train", "-j", "2x1", "--rdzv_port", str(_free_port()), *flags)
    assert "on 2 ranks" in shown
    trained = _values(tmp_path / "out" / "report.json")
    _job("cafe.dlrm.evaluate", "-j", "1x1", *flags)
    evaluated = _values(tmp_path / "out" / "evaluation.json")
    for name in ("cafe/auc", "cafe/log_loss"):
        assert evaluated[name] == pytest.approx(trained[name], abs=1e-6)


def test_the_status_of_a_benchmark_is_the_jobs():
    shown = _job("cafe.bench.run", "--", "hot_sketch", "--no_such_flag", succeeds=False)
    assert "unrecognized arguments: --no_such_flag" in shown
