"""The serving example, by the commands that its README shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples.serving import serve
from tests.launch.commands import commands_of, run_command

README = (Path(serve.__file__).parent / "README.md").read_text()
_ROW = r"^ *([a-z].*?)  +(\S+)  (0\.\d{4})   (0\.\d{5})$"


def _rows(text: str) -> dict[str, tuple[float, float, float]]:
    """Largest difference, AUC and log-loss by model."""
    return {
        name: (float(far), float(auc), float(log_loss))
        for name, far, auc, log_loss in re.findall(_ROW, text, re.MULTILINE)
    }


@pytest.mark.slow
def test_served_models_predict_as_the_trained_one(tmp_path: Path):
    printed = "".join(run_command(command, cwd=tmp_path) for command in commands_of(README))
    rows = _rows(printed)
    assert rows.keys() == _rows(README).keys()
    assert len(rows) == 8
    for name, (far, auc, log_loss) in rows.items():
        when = ", after the delta" if "delta" in name else ""
        _, trained_auc, trained_log_loss = rows[f"trained{when}"]
        assert far <= (0.01 if "int8" in name else serve.TOLERANCE)
        assert auc == pytest.approx(trained_auc, abs=0.001)
        assert log_loss == pytest.approx(trained_log_loss, abs=0.001)
    assert rows["int8"][0] > 0
    assert rows["trained"][2] != rows["trained, after the delta"][2]
    assert rows["trained"][1] > 0.7
