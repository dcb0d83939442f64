"""Ranks that are killed lose nothing; ``python -m tests.faults.kill`` does it fifty times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import kill

# Many processes, or many cases: on a busy machine they take long.
pytestmark = pytest.mark.timeout(900)


def test_a_killed_training_ends_as_one_left_alone(tmp_path: Path):
    killed = kill.run(tmp_path / "killed", steps=400, save_every=20, kills=2, seed=1, within=1.0)
    assert len(killed.recoveries) == 2
    assert killed.restarts == 2
    assert max(killed.recoveries) < kill.PATIENCE
    alone = kill.run(tmp_path / "alone", steps=400, save_every=20, kills=0, seed=1)
    assert alone.restarts == 0
    assert killed.checksum == alone.checksum
