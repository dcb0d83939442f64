"""The records of a study: those of a report, those that stand for others, and their bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import torchrec_cafe as tc
from benchmarks import quality
from benchmarks.quality_records import Records
from benchmarks.quality_run import Run, Study, restore, write_record
from benchmarks.quality_variants import DEFAULT, MEM_REC_DEFAULT, trained_as, variant

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


def test_cafe_as_it_comes_stands_for_another_variant_at_each_compression():
    runs = quality.plan_runs(["generator"], ["cafe_default"], [10, 100, 1000], 1)
    assert [run.variant for run in runs] == [
        "cafe:half_life=16000+medium_fraction=0",
        "cafe:half_life=16000+medium_fraction=0+num_weight_hashes=2+weight_fraction=0.6",
        "cafe:half_life=16000+medium_fraction=0+num_weight_hashes=2+weight_fraction=0.6",
    ]
    made = [{"data": r.data, "variant": r.variant, "compression": r.compression} for r in runs]
    records = Records([run | {"seed": 0, "status": "done", "auc": 0.7} for run in made])
    assert records.values("generator", "cafe_default", 100.0) == {0: 0.7}
    assert records.compressions("generator", ["cafe_default"]) == [10, 100, 1000]
    assert "cafe_default" in records.variants("generator", ablation=False)
    assert len(list(records)) == 3  # it is no run of its own


@pytest.mark.parametrize("compression", [10.0, 49.0, 50.0, 100.0, 299.0, 300.0, 10000.0])
def test_what_stands_for_the_default_is_the_default(compression):
    given = dict(text.split("=") for text in variant(trained_as(DEFAULT, compression)).cafe)
    default = tc.Cafe(compression=compression)
    weight_fraction = float(given.pop("weight_fraction", default.weight_fraction))
    assert weight_fraction == default.weight_fraction
    assert {name: float(value) for name, value in given.items()} == {
        "num_weight_hashes": default.weight_hashes,
        "medium_fraction": default.second_rows,
        "half_life": default.half_life,
    }


@pytest.mark.parametrize("compression", [10.0, 49.0, 50.0, 10000.0])
def test_what_stands_for_mem_rec_as_it_comes_is_that(compression):
    (text,) = variant(trained_as(MEM_REC_DEFAULT, compression)).mem_rec
    default = tc.MemRec(compression=compression)
    assert float(text.removeprefix("weight_fraction=")) == default.weight_share(row_bytes=64)


def test_what_stands_for_a_default_everywhere_is_not_listed_beside_it():
    own = trained_as(MEM_REC_DEFAULT, 100.0)

    def listed(*compressions: float) -> list[str]:
        run = {"data": "generator", "variant": own, "seed": 0, "status": "done", "auc": 0.7}
        records = Records([run | {"compression": c} for c in compressions])
        return records.variants("generator", ablation=False)

    assert listed(100.0, 1000.0) == [MEM_REC_DEFAULT]
    assert listed(10.0, 100.0) == [MEM_REC_DEFAULT, own]  # at 10x the default is another


def test_bytes_over_the_budget_are_named():
    sizes = {("full", 1.0): 1000, ("hash", 10.0): 100, ("cafe", 10.0): 101}
    found = [
        {"data": "generator", "variant": name, "compression": compression, "seed": 0}
        | {"status": "done", "embedding_bytes": size}
        for (name, compression), size in sizes.items()
    ]
    assert Records(found).over_budget() == ["generator/cafe@10x"]
