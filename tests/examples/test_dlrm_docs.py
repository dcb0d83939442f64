"""Every command of docs/dlrm.md runs, in order, on a small file in Criteo's format."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCS = (ROOT / "docs" / "dlrm.md").read_text()
COMMANDS = re.findall(r"^    (python -m examples\.dlrm\..*)$", DOCS, re.MULTILINE)


def run(command: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A command of the docs, in a folder of its own; flags that come last count."""
    _, *arguments = shlex.split(command)
    small = ("--full", "--cache_dir", "cache", "--batch_size", "128", "--profile_steps", "2")
    if "--data" not in arguments:
        small += ("--data", "path/to/train.txt")
    return subprocess.run(
        [sys.executable, *arguments, *small, *more],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files lie that the docs speak of."""
    random.seed(0)
    folder = tmp_path_factory.mktemp("docs")
    lines = []
    for _ in range(6000):
        ids = [int(random.random() ** 3 * 9000) for _ in range(26)]
        label = int(random.random() < 0.1 + 0.5 * (ids[0] % 2))
        integers = [str(random.randrange(100)) for _ in range(13)]
        lines.append("\t".join([str(label), *integers, *(f"{id_:08x}" for id_ in ids)]) + "\n")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "train.txt").write_text("".join(lines))
    (yaml,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (folder / "tables.yaml").write_text(yaml)
    return folder


@pytest.mark.slow
def test_every_command_of_the_docs_runs(folder: Path):
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    out = folder / "runs" / "latest"
    trained, tested = (
        {
            row["name"]: row["value"]
            for row in json.loads((out / f"{name}.json").read_text())["rows"]
        }
        for name in ("report", "evaluation")
    )
    for metric in ("auc", "log_loss", "normalized_entropy"):
        assert tested[f"cafe/{metric}"] == trained[f"cafe/{metric}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--checkpoint_dir must be given"),
        ("--checkpoint_dir nowhere", "nowhere/cafe_100x has no complete checkpoint"),
        (
            "--checkpoint_dir runs/checkpoints --num_embeddings 300",
            "the checkpoint does not fit, and nothing has been loaded: table 't_cat_",
        ),
    ],
)
def test_evaluation_says_errors_in_one_line(folder: Path, flags: str, message: str):
    if "runs/checkpoints" in flags and not (folder / "runs" / "checkpoints").exists():
        run(
            "python -m examples.dlrm.train --table_kind cafe --checkpoint_dir runs/checkpoints",
            folder,
        )
    done = run(f"python -m examples.dlrm.evaluate --table_kind cafe {flags}", folder)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert line.startswith("error: ")
    assert message in line
