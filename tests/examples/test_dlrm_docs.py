"""Every command of docs/dlrm.md runs, in order, on a small file in Criteo's format."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.criteo_files import write_criteo

ROOT = Path(__file__).parent.parent.parent
DOCS = (ROOT / "docs" / "dlrm.md").read_text()
#: commands that stand together
BLOCKS = re.findall(r"^(?:    python -m examples\.dlrm\..*\n)+", DOCS, re.MULTILINE)
REPORTS = ("report.json", "evaluation.json")


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
    folder = tmp_path_factory.mktemp("docs")
    (folder / "path" / "to").mkdir(parents=True)
    write_criteo(folder / "path" / "to" / "train.txt", samples=4000, ids=9000)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (folder / "tables.yaml").write_text(yaml)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_the_commands_of_the_docs_run(folder: Path, block: str):
    for command in block.splitlines():
        done = run(command.strip(), folder)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    out = folder / "runs" / "latest"
    if "dlrm.evaluate" in block:  # what was trained and saved just before
        trained, tested = (json.loads((out / f).read_text()) for f in REPORTS)
        for name in ("auc", "log_loss", "normalized_entropy"):
            assert trained["runs"][0][name] == tested["runs"][0][name]


def test_the_docs_have_commands():
    assert len(BLOCKS) == 4
    assert "dlrm.evaluate" in "".join(BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--checkpoint_dir must be given"),
        ("--checkpoint_dir nowhere", "nowhere/cafe_100x has no complete checkpoint"),
        (
            "--checkpoint_dir saved --num_embeddings 300",
            "the checkpoint does not fit, and nothing has been loaded: table 't_cat_",
        ),
    ],
)
def test_evaluation_says_errors_in_one_line(folder: Path, flags: str, message: str):
    if "saved" in flags:
        command = "python -m examples.dlrm.train --table_kind cafe --checkpoint_dir saved"
        assert run(command, folder, "--max_steps", "3").returncode == 0
    done = run(f"python -m examples.dlrm.evaluate --table_kind cafe {flags}", folder)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert line.startswith("error: ")
    assert message in line
