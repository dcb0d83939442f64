"""A study goes on elsewhere from the file of its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality_run import Run, Study, restore, write_record

RUN = Run("generator", "hash", 100.0, 0)


def results(folder: Path, **more: object) -> Path:
    path = folder / "report.json"
    record = vars(RUN) | {"status": "done", "auc": 0.7} | more
    path.write_text(json.dumps({"runs": [record, record | {"seed": 1}]}))
    return path


def test_runs_of_a_report_count_as_trained(tmp_path: Path):
    study = Study(tmp_path / "out", tmp_path)
    assert restore(study, results(tmp_path)) == 2
    assert quality.is_finished(study, RUN)
    assert not quality.is_finished(study, Run("generator", "hash", 10.0, 0))


def test_own_runs_stay(tmp_path: Path):
    study = Study(tmp_path / "out", tmp_path)
    write_record(study.record(RUN), vars(RUN) | {"status": "done", "auc": 0.9})
    assert restore(study, results(tmp_path)) == 1
    assert json.loads(study.record(RUN).read_text())["auc"] == 0.9


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [{"data": "generator"}]}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"--restore must be .* earlier report, got .*other.json"):
        restore(Study(tmp_path / "out", tmp_path), path)
    assert not (tmp_path / "out").exists()
