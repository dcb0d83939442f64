"""The report of the DLRM example."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from examples.dlrm import plots, report
from examples.dlrm.config import parse_args
from examples.dlrm.data import ClickLog, FeatureSpec, Split
from examples.dlrm.loop import Result
from examples.dlrm.scalars import read_scalars, scalars_folder
from examples.dlrm.step_parts import PURPOSES, by_purpose, median_parts

MEMORY = {"shared_bytes": 600, "hot_bytes": 300, "sketch_bytes": 90, "map_bytes": 10}


def make_result(kind: str, auc: float, **more: object) -> Result:
    result = Result(
        kind=kind,
        compression=10 if kind in ("hash", "cafe") else 1,
        seed=0,
        auc=auc,
        log_loss=0.1,
        normalized_entropy=0.9,
        embedding_bytes=1000,
        samples_per_second=1,
        memory=MEMORY,
        step_parts={"dense layers": 3.0, "torchrec_cafe::learn": 1.0},
    )
    return dataclasses.replace(result, **more)


@pytest.fixture
def log() -> ClickLog:
    nothing = Split(np.zeros(0), np.zeros((0, 1)), np.zeros((0, 1)))
    return ClickLog(
        name="log",
        description="made up",
        features=(FeatureSpec("user", 1000),),
        num_dense=1,
        train=nothing,
        test=nothing,
    )


def test_a_report_has_its_plots_and_no_others(tmp_path: Path, log: ClickLog):
    config = parse_args(["--out", str(tmp_path), "--compression", "10"])
    with SummaryWriter(scalars_folder(config.out, "cafe 10x")) as writer:
        for step in range(4):
            writer.add_scalar("pool_a/hot_share", step / 10, 100 * step)
            writer.add_scalar("pool_a/promoted", step**2, 100 * step)
    results = [make_result("full", 0.8), make_result("hash", 0.6), make_result("cafe", 0.75)]
    shown = report.save(config, log, results)
    assert "75%" in shown
    page = (tmp_path / "report.md").read_text()
    assert "| cafe | 600 B (60%) | 300 B (30%) | 90 B (9%) | 10 B (1%) | 1000 B |" in page
    for name in ("report.png", "hot_share.png", "step_time.png"):
        assert f"]({name})" in page
        assert matplotlib.image.imread(tmp_path / name).std() > 0.05
    plain = [dataclasses.replace(make_result("full", 0.8), step_parts={})]
    report.save(config, log, [*plain])
    assert "hot_share.png" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "hot_share.png").exists()
    assert not (tmp_path / "step_time.png").exists()


def test_a_report_says_which_state_was_tested(tmp_path: Path, log: ClickLog):
    config = parse_args(["--out", str(tmp_path)])
    best = {"tested": "best", "tested_step": 1200}
    results = [make_result("full", 0.8, **best), make_result("cafe", 0.7, tested_step=1500)]
    report.save(config, log, results)
    page = (tmp_path / "report.md").read_text()
    assert "full the best of its validations (step 1,200), cafe its last (step 1,500)" in page


def test_scalars_of_an_earlier_start_are_hidden_where_another_went_over_them(tmp_path: Path):
    for begin, values in ((0, range(4)), (200, (7, 8))):
        with SummaryWriter(tmp_path, purge_step=begin) as writer:
            for number, value in enumerate(values):
                writer.add_scalar("train/loss", value, begin + 100 * number)
    assert read_scalars(tmp_path, "loss") == {"train": [(0, 0), (100, 1), (200, 7), (300, 8)]}
    assert read_scalars(tmp_path, "other") == {}
    assert read_scalars(tmp_path / "nowhere", "loss") == {}


def test_every_part_of_a_step_has_a_purpose():
    parts = {"dense layers": 3.0, "torchrec_cafe::learn": 1.0, "torchrec_cafe::remap": 2.0}
    purposes = by_purpose(parts | {"everything else": 0.5})
    assert tuple(purposes) == PURPOSES
    assert sum(purposes.values()) == 6.5
    assert purposes["sketch and hot rows"] == 1.0
    assert purposes["ids to rows"] == 2.0
    assert median_parts([{"a": 1.0}, {"a": 5.0, "b": 9.0}, {"a": 2.0}]) == {"a": 2.0, "b": 0.0}


def test_kinds_have_a_colour_each():
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
