"""A TorchRec training before and after: the same losses, few changed lines, and what is shown."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest

from examples.existing_pipeline import after, before
from tests.distributed.ranks import run_ranks
from tests.launch.commands import commands_of, run_command

FOLDER = Path(before.__file__).parent
README = (FOLDER / "README.md").read_text()


def _losses(folder: str) -> dict[str, list[float]]:
    arguments = ["--steps", "40", "--checkpoint", f"{folder}/before"]
    losses = {"before": before.train(before.parse_args(arguments))}
    arguments[-1] = f"{folder}/plain"
    losses["plain"] = after.train(after.parse_args([*arguments, "--compression", "1"]))
    # Each goes on from what the other has saved.
    losses["plain, on"] = after.train(after.parse_args([*arguments, "--compression", "1"]))
    losses["before, on"] = before.train(before.parse_args([*arguments[:-1], f"{folder}/before"]))
    arguments[-1] = f"{folder}/cafe"
    for name in ("cafe", "cafe, on"):
        losses[name] = after.train(after.parse_args(arguments))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_are_those_of_before_to_the_last_bit(tmp_path: Path, world_size: int):
    for losses in run_ranks(world_size, tmp_path / "ranks", _losses, str(tmp_path)):
        assert losses["plain"] == losses["before"]
        assert losses["plain, on"] == losses["before, on"]
        assert losses["cafe"] != losses["before"]
        for name in ("before", "cafe"):
            assert sum(losses[name][-10:]) < sum(losses[name][:10]) - 0.5
            # A training that goes on has seen the same rows once.
            assert sum(losses[f"{name}, on"]) < sum(losses[name]) - 1


def _diff() -> list[str]:
    sides = [(FOLDER / name).read_text().splitlines() for name in ("before.py", "after.py")]
    return list(difflib.unified_diff(*sides, "before.py", "after.py", lineterm="", n=1))


def test_the_diff_that_is_shown_is_the_diff():
    (shown,) = re.findall(r"```diff\n(.*?)\n```", README, re.DOTALL)
    assert shown.splitlines() == _diff()


def test_few_lines_change():
    changed = [line for line in _diff()[2:] if line[0] in "+-"]
    assert len(changed) <= 15
    assert f"{len(changed)} changed lines" in README


@pytest.mark.slow
def test_commands_print_what_is_shown():
    shown = re.findall(r"^step \d+: loss \S+$", README, re.MULTILINE)
    printed = []
    for command in commands_of(README):
        printed += re.findall(r"^step \d+: loss \S+$", run_command(command), re.MULTILINE)
    rounded = [
        [re.sub(r"(\.\d\d)\d*$", r"\1", line) for line in lines] for lines in (shown, printed)
    ]
    # Of each command the first and the last line are shown; digits depend on the machine.
    assert set(rounded[0]) <= set(rounded[1])
