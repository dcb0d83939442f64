"""What a machine without a compiler or a recent Python is told, before anything is written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", ["train", "test"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("CXX=no-such-compiler", "error: no C++ compiler: no-such-compiler not found"),
        ("PYTHON=no-such-python", "error: no-such-python not found: install Python 3.11 or later"),
    ],
)
def test_missing_tools_are_named(tmp_path: Path, command: str, setting: str, message: str):
    for name in ("Makefile", "requirements-cpu.txt", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "packaging", tmp_path / "packaging")
    (tmp_path / "csrc").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        ["make", command, setting],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(message)
    assert sorted(tmp_path.rglob("*")) == before
