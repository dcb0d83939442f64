"""Counters of lookups, from a real callgrind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind")
def test_an_id_of_a_small_token_table_misses_the_last_level_seldom(tmp_path: Path):
    name, path = "MEM-REC 20,000 FP16", tmp_path / "counters.json"
    command = [sys.executable, "-m", "benchmarks.mem_rec_counters", "--only", name]
    command += ["--gib", "0.05", "--samples", "16", "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    value = {row["name"]: row["value"] for row in json.loads(path.read_text())["rows"]}
    # A row of 128 columns takes four lines, and four weights one each.
    assert 100 < value[f"{name}/instructions"] < 2000
    assert 4 < value[f"{name}/first-level misses"] < 12
    assert value[f"{name}/last-level misses"] < 2
