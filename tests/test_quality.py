"""The accuracy study: figures, the oracle, hooks into real trainings, and the command line."""

from __future__ import annotations

import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks import quality
from benchmarks.quality_oracle import Budget, choose_hot_ids, keep_spread, oracle_log, row_of_id
from benchmarks.quality_records import Records, figures, won_back
from benchmarks.quality_report import summary, table_of
from benchmarks.quality_run import Run, Study, read_records, write_record
from benchmarks.quality_traces import FROZEN, read_trace, recalls
from benchmarks.quality_variants import (
    BASELINE_CAFE,
    DEFAULT,
    VARIANTS,
    kernels,
    per_table,
    pools,
    trained_as,
    variant,
)
from examples.dlrm.config import TrainConfig
from examples.dlrm.data import ClickLog
from examples.dlrm.data.generator import write_generated
from examples.dlrm.data.storage import open_click_log
from examples.dlrm.loop import OnStep, run
from examples.dlrm.model import table_shapes
from tests.distributed.ranks import run_ranks
from torchrec_cafe.config import TableShape
from torchrec_cafe.ops import TABLE_COLUMNS, mix_ids

ROOT = Path(__file__).parent.parent
SIZES = (3000, 12, 2000, 400)


def make_log(folder: Path, num_train: int, **options: Any) -> ClickLog:
    folder.mkdir(parents=True)
    write_generated(folder, num_train, num_train // 4, num_embeddings=SIZES, **options)
    return open_click_log(folder)


def record(name: str, compression: float, seed: int, auc: float, **more: Any) -> dict[str, Any]:
    made = {"data": "generator", "variant": name, "compression": compression, "seed": seed}
    measured = {"log_loss": 0.5, "embedding_bytes": 10, "samples_per_second": 1.0}
    return made | measured | {"status": "done", "auc": auc} | more


# Figures.


def test_won_back_is_paired_by_seed():
    full, hashed = {0: 0.8, 1: 0.82, 2: 0.9}, {0: 0.7, 1: 0.72}
    assert won_back(full, hashed, {0: 0.75, 1: 0.8, 2: 0.9}) == pytest.approx([0.5, 0.8])
    assert won_back(full, hashed, {1: 0.7}) == pytest.approx([-0.2])
    assert won_back(full, {}, {0: 0.75}) == []
    assert won_back(full, {0: 0.81, 1: 0.72}, {0: 0.9, 1: 0.8}) == []


def test_summary_gives_mean_spread_and_seeds():
    assert summary([0.5, 0.7], ".2f") == "0.60 ± 0.14 (2)"
    assert summary([-0.5], "+.1f") == "\N{MINUS SIGN}0.5 (1)"
    assert summary([], ".2f") == ""


def test_figures_and_tables_hold_cafe_to_its_targets():
    records = [record("full", 1.0, seed, 0.80 + 0.01 * seed) for seed in (0, 1)]
    records += [record("hash", 100.0, seed, 0.70 + 0.01 * seed) for seed in (0, 1)]
    own, at_most = trained_as(DEFAULT, 100.0), trained_as(DEFAULT, 10000.0)
    records += [record(own, 100.0, 0, 0.785), record(own, 100.0, 1, 0.793)]
    records += [record("cafe", 100.0, seed, 0.789) for seed in (0, 1)]
    records += [record("frequency", 100.0, seed, 0.784) for seed in (0, 1)]
    refused = {"status": "refused", "error": "too little"}
    records.append(record(at_most, 10000.0, 0, 0.0, **refused))
    study = Records(records)
    rows = {figure.name: figure for figure in figures(study)}
    won = rows["generator/cafe_default@100x/won_back"]
    assert won.value == pytest.approx(0.84)
    assert (won.target, won.met, won.seeds) == (0.81, True, 2)
    over = rows["generator/cafe_default@100x/auc_over_hash"]
    assert over.value == pytest.approx(0.084)
    assert over.met
    assert rows["generator/frequency@100x/auc_over_cafe"].value == pytest.approx(-0.005)
    assert rows["generator/full/auc"].value == pytest.approx(0.805)
    table = table_of(study, "won_back", "generator")
    assert table == [
        ["tables", "100×", "10000×"],
        ["cafe_default", "84% ± 1% (2), target 81%: met", "-"],
        ["cafe", "84% ± 7% (2)", ""],
    ]
    assert study.notes("generator") == [f"{at_most} at 10000×, seed 0, refused: too little"]
    assert not any(f.target for f in figures(Records(records, judge=False)))


# What is run.


def test_a_study_finishes_one_seed_before_the_next():
    runs = quality.plan_runs(["promotions", "generator_drift"], [], [], 2)
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)
    drift = {(r.variant, r.compression) for r in runs if r.data == "generator_drift"}
    assert ("full", 1.0) in drift
    assert ("cafe", 10000.0) in drift
    assert ("fresh", 1000.0) in drift
    assert ("fresh", 10.0) not in drift
    assert not any(r.variant == "fresh" for r in runs if r.data == "promotions")
    chosen = quality.plan_runs(["generator"], ["full", "frequency"], [7.0], 1)
    assert [r.name for r in chosen] == ["full@1x_seed0", "frequency@7x_seed0"]


def test_variants_are_made_from_arguments():
    made = variant("cafe:hot_fraction=.5+hysteresis=.3")
    assert made.cafe == (*BASELINE_CAFE, "hot_fraction=.5", "hysteresis=.3")
    assert made.ablation
    assert variant("cafe:num_weight_hashes=2").cafe == (
        "medium_fraction=0.3",
        "half_life=4000",
        "num_weight_hashes=2",
    )
    assert variant("no_decay").cafe == (*BASELINE_CAFE[:2], "half_life=inf")
    made = variant("mem_rec:num_hashes=2+epochs=3")
    assert (made.kind, made.mem_rec, made.epochs) == ("mem_rec", ("num_hashes=2",), 3)
    assert not made.ablation
    assert variant("full:epochs=2").compressions((10.0,)) == (1.0,)
    with pytest.raises(ValueError, match="--variants must be of full, hash, .* got 'magic'"):
        variant("magic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "magic"], "--variants must be of full, hash"),
        (["--variants", "hash:num_hashes=2"], "hash has no arguments but epochs"),
        (["--variants", "full:epochs=many"], "epochs must be given once, as a number"),
        (["--variants", "mem_rec:magic=1"], "--mem_rec must be NAME=VALUE"),
        (["--variants", "cafe:magic=1"], "--cafe must be NAME=VALUE"),
        (["--data", "criteo"], "--data must be of promotions, .*, traces, got 'criteo'"),
        (["--compressions", "10,many"], "--compressions must be numbers, got '10,many'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as error:
        quality.main(arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_hardware_is_named_by_cores_and_processor():
    assert quality.hardware("2 x AMD EPYC, torch 2.13.0+cpu") == "2-core-EPYC"
    described = "16 x Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz, NVIDIA H200, torch 2.11"
    assert quality.hardware(described) == "16-core-Xeon-Platinum-8488C"
    assert quality.hardware("1 x AMD EPYC 7763 64-Core Processor, torch") == "1-core-EPYC-7763"


def test_tables_with_too_little_for_a_pool_are_hashed_together():
    shapes = [
        TableShape(name=f"t{i}", num_embeddings=size, embedding_dim=16)
        for i, size in enumerate((1_000_000, 3, 300_000, 2))
    ]
    tables, counts = per_table(shapes, 1000)
    # The two small tables have no row between them: the third largest joins them.
    assert counts == {"tables_with_pool": 1, "tables_hashed": 3}
    kinds = {name: type(constraint.table).__name__ for name, constraint in tables.items()}
    assert kinds == {"t0": "Cafe", "t1": "Hash", "t2": "Hash", "t3": "Hash"}
    with pytest.raises(ValueError, match="leaves no row"):
        per_table(shapes, 1e6)


# The oracle.


def test_the_most_frequent_ids_of_tracked_features_own_rows():
    frequencies = [np.array([5, 0, 9, 1]), np.array([99, 99]), np.array([5, 5, 7])]
    budget = Budget(shared_rows=(2, 2, 2), tracked=(True, False, True), hot_rows=3)
    hot = choose_hot_ids(frequencies, budget)
    assert [ids.tolist() for ids in hot] == [[0, 2], [], [2]]
    rows = row_of_id(4, 2, hot[0])
    assert rows[[0, 2]].tolist() == [0, 1]
    assert set(rows[[1, 3]]) <= {2, 3}
    assert row_of_id(2, 2, hot[1]).tolist() == [0, 1]


def test_oracle_log_has_the_rows_of_cafe_for_all_other_ids(tmp_path: Path):
    log = make_log(tmp_path / "log", 4000)
    shapes = table_shapes(TrainConfig(), log)
    budget = Budget.of(shapes, 4)
    oracle = oracle_log(log, budget, tmp_path)
    dense = sum(shape.dense_bytes for shape in shapes)
    assert dense * 0.95 < 4 * 64 * sum(f.num_embeddings for f in oracle.features) <= dense
    assert oracle.train.labels is log.train.labels
    assert len(oracle.test.ids) == len(log.test)
    counts = [np.bincount(log.train.ids[:, i], minlength=n) for i, n in enumerate(SIZES)]
    hot = choose_hot_ids(counts, budget)
    assert sum(map(len, hot)) == budget.hot_rows
    least = min(c[ids].min() for c, ids in zip(counts, hot, strict=True) if len(ids))
    for column, size in enumerate(SIZES):
        ids, rows = log.test.ids[:, column], oracle.test.ids[:, column]
        if not budget.tracked[column]:
            assert np.array_equal(ids, rows)
            continue
        owned, shared = len(hot[column]), budget.shared_rows[column]
        assert oracle.features[column].num_embeddings == owned + shared
        is_hot = np.isin(ids, hot[column])
        assert len(set(rows[is_hot])) == len(set(ids[is_hot]))
        assert rows[is_hot].max() < owned
        mixed = mix_ids(
            torch.from_numpy(ids[~is_hot].astype(np.int64)),
            torch.tensor([0, int((~is_hot).sum())]),
            torch.tensor([size]),
            torch.zeros(1, dtype=torch.int64),
        )
        assert rows[~is_hot].tolist() == (owned + mixed * shared // size).tolist()
        cold = np.setdiff1d(np.arange(size), hot[column])
        assert counts[column][cold].max() <= least


# Hooks, in a real training.


def _train(log: ClickLog, folder: str, hook: OnStep, kind: str = "cafe") -> list[dict[str, Any]]:
    """What a training looks like before each step, after the hook."""
    config = TrainConfig(
        batch_size=64,
        compression=(4.0,),
        cafe=("num_shards=4", "rebalance_interval=1"),
        over_arch=(8,),
        out=folder,
    )
    seen: list[dict[str, Any]] = []

    def on_step(step: int, model: DistributedModelParallel) -> None:
        hook(step, model)
        weights = {n: float(p.abs().max()) for n, p in model.named_parameters() if "t_cat" in n}
        now: dict[str, Any] = {"step": step, "weights": weights}
        for pool in pools(model):
            column = TABLE_COLUMNS.index("shared_rows")
            now["learned"] = int(pool.sketch.steps[0])
            now["score"] = float(pool.sketch.scores.sum())
            now["shared_rows"] = pool.tables[:, column].tolist()
        seen.append(now | {"kernels": len(list(kernels(model)))})

    result = run(config, log, kind, 4.0, 0, on_step=on_step)
    assert 0 < result.auc < 1
    return seen


def _trainings(folder: str) -> dict[str, list[dict[str, Any]]]:
    log = open_click_log(Path(folder) / "log")
    made: dict[str, list[dict[str, Any]]] = {}
    for name in ("wrong_row", "frozen", "fresh"):
        hook = VARIANTS[name].hook
        assert hook is not None
        made[name] = _train(log, folder, hook(2.0))
    oracle = oracle_log(log, Budget.of(table_shapes(TrainConfig(), log), 4), Path(folder))
    made["oracle"] = _train(oracle, folder, keep_spread(log, oracle), "full")
    return made


@pytest.mark.slow
def test_hooks_change_what_they_say(tmp_path: Path):
    make_log(tmp_path / "log", 1280)
    (seen,) = run_ranks(1, tmp_path / "ranks", _trainings, str(tmp_path))
    for steps in seen.values():
        assert [now["step"] for now in steps] == list(range(20))
    assert [now["learned"] for now in seen["frozen"]] == [0, 1, *[2] * 18]
    scores = [now["score"] for now in seen["fresh"]]
    assert [step for step, score in enumerate(scores) if score == 0] == [0, 18]
    assert seen["fresh"][-1]["learned"] == 19
    right, wrong = seen["fresh"][0]["shared_rows"], seen["wrong_row"][0]["shared_rows"]
    assert wrong == [rows // 2 for rows in right]
    for column, size in enumerate(SIZES):
        (largest,) = (
            weight
            for name, weight in seen["oracle"][0]["weights"].items()
            if f"t_cat_{column}." in name
        )
        assert 0.7 * size**-0.5 < largest <= 1.001 * size**-0.5


# Traces.


def test_traces_are_read_as_types_and_objects(tmp_path: Path):
    accesses = np.array([5 | 3 << 27, 7], dtype=">u4")
    path = tmp_path / "web.trace.xz"
    path.write_bytes(lzma.compress(accesses.tobytes()))
    assert read_trace(path).tolist() == [3 << 48 | 5, 7]
    path.write_bytes(lzma.compress(b"abc"))
    with pytest.raises(ValueError, match="must hold 4-byte accesses, got 3 bytes"):
        read_trace(path)


def test_a_decayed_hot_set_follows_a_drifting_trace():
    random = np.random.default_rng(0)
    eighths = [np.minimum(random.zipf(1.3, 20_000), 4000) + 2000 * number for number in range(8)]
    measured = recalls(torch.from_numpy(np.concatenate(eighths)))
    recall = {rule: float(np.mean(values[1:])) for rule, values in measured["recall"].items()}
    assert measured["accesses"] == 160_000
    assert recall["half-life 0.25 × eighth"] > 0.6
    assert recall["half-life 0.25 × eighth"] > recall["no decay"] + 0.1
    assert recall["no decay"] > recall[FROZEN] + 0.1


# The command line.


def _command(folder: Path, *flags: str) -> list[str]:
    paths = {"cache_dir": "cache", "out": "out", "traces": "none"}
    given = [f"--{name}={folder / path}" for name, path in paths.items()]
    return ["--seeds=1", *given, *flags]


def _kill_after_the_first_record(folder: Path, first: Path, *flags: str) -> None:
    study = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.quality", *_command(folder, "--jobs=1", *flags)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not first.is_file() and study.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_reports_what_failed(tmp_path: Path, capsys):
    make_log(tmp_path / "cache" / "generator-v1", 24_000)
    # A folder that claims to be the promotions, but is not.
    (tmp_path / "cache" / "promotions-v1").mkdir()
    records = tmp_path / "out" / "generator"
    first = records / "hash@4x_seed0.json"
    flags = ("--data=generator", "--compressions=4")
    _kill_after_the_first_record(tmp_path, first, *flags, "--variants=hash,cafe")
    assert not list((tmp_path / "out").rglob("cafe@4x_seed0.json"))
    written = first.stat().st_mtime_ns

    quality.main(_command(tmp_path, *flags, "--variants=full,hash,cafe,oracle"))
    quality.main(
        _command(
            tmp_path,
            *("--data=generator,promotions,traces", "--variants=hash", "--compressions=1e5"),
            *("--json", str(tmp_path / "figures.json"), "--results", str(tmp_path / "results")),
        )
    )
    assert first.stat().st_mtime_ns == written
    shown = capsys.readouterr().out
    assert "skipped; see --traces" in shown
    made = {path.stem: json.loads(path.read_text()) for path in records.glob("*.json")}
    assert set(made) == {
        f"{name}_seed0" for name in ("full@1x", "hash@4x", "cafe@4x", "oracle@4x", "hash@100000x")
    }
    assert all(0.4 < r["auc"] < 0.9 for r in made.values() if r["status"] == "done")
    assert made["hash@100000x_seed0"]["status"] == "refused"
    assert made["cafe@4x_seed0"]["pools"]
    assert made["cafe@4x_seed0"]["config"]["batch_size"] == 8192
    failed = json.loads((tmp_path / "out" / "promotions" / "hash@100000x_seed0.json").read_text())
    assert failed["status"] == "failed"
    assert "FileNotFoundError" in failed["error"]
    assert "hash at 100000×, seed 0, failed: FileNotFoundError" in shown

    report = json.loads((tmp_path / "figures.json").read_text())
    values = {row["name"]: row for row in report["rows"]}
    assert "generator/cafe@4x/won_back" in values or (
        values["generator/hash@4x/auc"]["value"] >= values["generator/full/auc"]["value"]
    )
    assert values["generator/oracle@4x/embedding_bytes"]["value"] <= sum(SIZES) * 64 / 4
    assert len(report["runs"]) == 6
    suffixes = sorted(path.suffix for path in (tmp_path / "results").iterdir())
    assert suffixes == [".json", ".md", ".png"]


def test_a_process_that_dies_without_a_word_is_recorded(tmp_path: Path):
    # An unknown variant is an error of the command line, before there is any record.
    study = Study(tmp_path / "out", tmp_path)
    quality.Workers(study, 1).run([Run("generator", "magic", 10.0, 0), Run("x", "full", 1.0, 0)])
    records = read_records(study, ["generator", "x"])
    assert [r["status"] for r in records] == ["failed", "failed"]
    assert not quality.is_finished(study, Run("generator", "magic", 10.0, 0))
    write_record(study.record(Run("x", "full", 1.0, 0)), records[1] | {"status": "refused"})
    assert quality.is_finished(study, Run("x", "full", 1.0, 0))
