"""Commands of the documents print what the documents show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch.commands import commands_of, run_command, transcripts
from tests.launch.torchx import ROOT


def _masked(line: str) -> str:
    """Without what differs from run to run: numbers, names of jobs, spaces."""
    line = re.sub(r"\d[\d.,e+-]*", "#", line)
    return " ".join(line.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_launching_prints_what_is_shown(tmp_path: Path):
    text = (ROOT / "docs" / "launch.md").read_text()
    assert len(commands_of(text)) == 7
    for command, shown in transcripts(text):
        printed = [_masked(line) for line in run_command(command, cwd=tmp_path).splitlines()]
        at = 0
        for line in shown:
            if line != "...":
                assert _masked(line) in printed[at:], f"{command}: {line}"
                at += printed[at:].index(_masked(line)) + 1
    assert (tmp_path / "runs" / "latest" / "evaluation.json").is_file()


def test_the_readmes_jobs_are_what_schedulers_are_asked_for():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    (torchx run -s (slurm|kubernetes) .*)$", text, re.MULTILINE)
    assert [scheduler for _, scheduler in commands] == ["slurm", "kubernetes"]
    for command, _ in commands:
        printed = run_command(command.replace("torchx run", "torchx run --dryrun", 1))
        assert "-m examples.dlrm.train --full" in printed
