"""The example as a user starts it: TorchX, two gloo ranks, files, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchrec_cafe as tc
from examples.dlrm.config import CUSTOM, KINDS, TrainConfig, parse_args
from examples.dlrm.data import ClickLog, FeatureSpec, Split
from examples.dlrm.loop import Result
from examples.dlrm.model import constraints
from examples.dlrm.report import table
from tests.examples.criteo_files import write_criteo
from tests.launch.torchx import torchx

ROOT = Path(__file__).parent.parent.parent


def torchx_train(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """``torchx run`` of the component, as ``make train`` does it."""
    return torchx(
        *("run", "-s", "local_cwd", "torchx_components/dlrm.py:train", "--"),
        *("--cache_dir", str(folder / "cache"), "--out", str(folder / "out"), *flags),
    )


@pytest.fixture(scope="module")
def criteo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file in Criteo's published format, made here: label, 13 integers, 26 hex ids."""
    path = tmp_path_factory.mktemp("criteo") / "train.txt"
    write_criteo(path, samples=7000, ids=400)
    return path


@pytest.mark.slow
def test_two_ranks_train_every_kind_and_report(tmp_path: Path, criteo_file: Path):
    done = torchx_train(
        tmp_path,
        *("--data", str(criteo_file), "--full", "--batch_size", "64", "--compression", "4"),
        *("--checkpoint_dir", str(tmp_path / "checkpoints"), "--learning_rate", "0.2"),
        *("--kinds", "full,hash,cafe,mem_rec"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    values = {row["name"]: row["value"] for row in report["rows"]}
    for kind in ("full", "hash", "cafe", "mem_rec"):
        assert 0.5 < values[f"{kind}/auc"] <= 1
        assert 0 < values[f"{kind}/log_loss"] < 1
        assert values[f"{kind}/samples_per_second"] > 0
    dense = values["full/embedding_bytes"]
    for kind in ("hash", "cafe", "mem_rec"):
        assert values[f"{kind}/embedding_bytes"] <= dense / 4
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000
    assert "| cafe |" in (tmp_path / "out" / "report.md").read_text()
    (events,) = (tmp_path / "out" / "tensorboard" / "cafe_4x").iterdir()
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/samples_per_second"} <= set(scalars)
    (checkpoint,) = (tmp_path / "checkpoints" / "cafe_4x").iterdir()
    assert (checkpoint / ".metadata").is_file()
    shown = done.stdout + done.stderr
    assert "samples/s" in shown
    assert "tables" in shown


@pytest.mark.slow
def test_a_training_goes_on_where_it_was_stopped(tmp_path: Path, criteo_file: Path):
    """With the result of one that was not, to the last digit; then it has nothing left to train."""

    def train(*options: str) -> dict[str, float]:
        done = torchx_train(
            tmp_path,
            *("--data", str(criteo_file), "--full", "--batch_size", "64", "--compression", "4"),
            *("--kinds", "cafe", "--learning_rate", "0.2", *options),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        return {row["name"]: row["value"] for row in report["rows"]}

    whole = train()
    saved = ("--checkpoint_dir", str(tmp_path / "checkpoints"), "--checkpoint_every", "7")
    train(*saved, "--max_steps", "20")
    resumed = train(*saved)
    again = train(*saved)
    for name in ("cafe/auc", "cafe/log_loss"):
        assert resumed[name] == whole[name]
    assert again == resumed


@pytest.mark.slow
def test_look_ahead_tables_train_what_full_tables_do(tmp_path: Path, criteo_file: Path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
            *("-m", "examples.dlrm.train", "--data", str(criteo_file), "--full"),
            *("--batch_size", "64", "--kinds", "full,lookahead", "--learning_rate", "0.2"),
            *("--lookahead", "cache_fraction=0.2,min_slots=1", "--depth", "3"),
            *("--cache_dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    values = {row["name"]: row["value"] for row in report["rows"]}
    for metric in ("auc", "log_loss"):
        assert values[f"lookahead/{metric}"] == values[f"full/{metric}"]
    (events,) = (tmp_path / "out" / "tensorboard" / "lookahead").iterdir()
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    of_pools = {tag.split("/")[1] for tag in scalars if tag.startswith("lookahead_pool_")}
    assert {"hits", "seconds_hidden"} <= of_pools
    assert "of it hidden" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_failing_rank_fails_the_job_and_leaves_no_report(tmp_path: Path):
    done = torchx_train(tmp_path, "--data", "no/such/file")
    assert done.returncode != 0
    shown = (done.stdout + done.stderr).splitlines()
    assert len([line for line in shown if "error: " in line and "no/such/file" in line]) == 1
    assert not (tmp_path / "out").exists()


def make_train(*flags: str) -> subprocess.CompletedProcess[str]:
    """``make train`` up to the first error."""
    return subprocess.run(
        ["make", "train", f"ARGS={' '.join(flags)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "no/such/file"], "'no/such/file', which does not exist; check the path"),
        (["--embedding_dim", "6"], "--embedding_dim must be a multiple of 4"),
        (
            ["--data", "{bad}", "--full"],
            "line 6: must have 40 columns with tabs between them, got 37",
        ),
        (
            ["--data", "{good}", "--full", "--compression", "1e9"],
            "the largest compression that works is",
        ),
    ],
)
def test_make_train_says_errors_in_one_line(
    tmp_path: Path, criteo_file: Path, flags: list[str], message: str
):
    bad = tmp_path / "train.txt"
    lines = criteo_file.read_text().splitlines()
    bad.write_text("\n".join([*lines[:5], lines[5].rsplit("\t", 3)[0], *lines[6:50]]) + "\n")
    cache, out = tmp_path / "cache", tmp_path / "out"
    named = [flag.format(bad=bad, good=criteo_file) for flag in flags]
    done = make_train(*named, "--cache_dir", str(cache), "--out", str(out))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stdout + done.stderr
    assert not out.exists()
    assert not list(cache.rglob("*.npy")) or "{good}" in flags


def test_flags_are_the_fields_of_the_config():
    assert parse_args([]) == TrainConfig()
    config = parse_args(
        ["--full", "--kinds", "hash,cafe", "--compression", "10,100", "--seed", "1"]
    )
    assert config.full
    assert config.kinds == ("hash", "cafe")
    assert config.compression == (10.0, 100.0)
    assert config.seed == (1,)


def test_arguments_of_cafe_reach_the_tables():
    config = parse_args(
        [
            "--cafe",
            "half_life=200,threshold=none,rebalance_interval=4",
            "--mem_rec",
            "num_hashes=2,per=sample",
        ]
    )
    arguments = {"half_life": 200.0, "threshold": None, "rebalance_interval": 4}
    assert config.cafe_arguments() == arguments
    nothing = np.zeros((0, 1))
    log = ClickLog(
        name="log",
        description="empty",
        features=(FeatureSpec("user", 1000),),
        num_dense=1,
        train=Split(nothing, nothing, nothing),
        test=Split(nothing, nothing, nothing),
    )
    kinds = [kind for kind in KINDS if kind != CUSTOM]
    kept = {kind: constraints(config, log, kind, 10)["t_user"].table for kind in kinds}
    assert kept["full"] is None
    assert kept["cafe"] == tc.Cafe(compression=10, **arguments)
    assert kept["hash_whole"] == tc.Hash(compression=10, whole_fraction=0.25)
    assert kept["mem_rec"] == tc.MemRec(compression=10, num_hashes=2, per="sample")
    assert len(set(kept.values())) == len(kinds)
    assert config.over_arch == (256, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--kinds", "full,magic"],
            "--kinds must be of full, hash, .*cafe_single_level, .*, custom, got full, magic",
        ),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--mem_rec", "num_hashes=0"], r"--mem_rec: num_hashes must be in \[1, 16\], got 0"),
        (["--mem_rec", "half_life=3"], "--mem_rec must be NAME=VALUE,... with names of num_hashes"),
        (["--optimizer", "lamb"], "--optimizer must be of rowwise_adagrad, adagrad, sgd"),
        (["--seed", ""], "need at least one value"),
        (["--max_steps", "-1"], "--max_steps must be at least 0, got -1"),
        (["--learning_rate", "nan"], "--learning_rate must be finite and above 0, got nan"),
        (["--dense_learning_rate", "-1"], "--dense_learning_rate must be finite and above 0"),
        (["--compression", "10,0.5"], "--compression must be finite and at least 1, got 0.5"),
        (["--sample", "many"], "argument --sample: invalid int value: 'many'"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--over_arch", "64,0"], r"--over_arch needs layers of at least 1, got \(64, 0\)"),
        (["--cafe", "hot_fraction"], "--cafe must be NAME=VALUE,... with names of hot_fraction"),
        (["--cafe", "compression=9"], "--cafe must be NAME=VALUE,.* got 'compression=9'"),
        (["--cafe", "half_life=long"], "--cafe: half_life must be float, got 'long'"),
        (["--cafe", "rebalance_interval=1.5"], "--cafe: rebalance_interval must be int, got '1.5'"),
        (["--cafe", "half_life=-1"], "--cafe: half_life must be > 0, got -1.0"),
    ],
)
def test_options_out_of_range(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse_args(arguments)


def test_table_gives_means_and_what_is_won_back():
    def result(kind: str, seed: int, auc: float) -> Result:
        return Result(
            kind=kind,
            compression=1 if kind == "full" else 10,
            seed=seed,
            auc=auc,
            log_loss=0.1,
            normalized_entropy=0.9,
            embedding_bytes=1000,
            samples_per_second=1,
        )

    results = [
        result(kind, seed, auc + 0.01 * seed)
        for seed in (0, 1)
        for kind, auc in (("full", 0.8), ("hash", 0.6), ("cafe", 0.75))
    ]
    rows = {row[0]: row for row in table(results)}
    assert rows["full"][1] == "0.8050 ± 0.0071"
    assert rows["cafe"][2] == "75%"
    assert rows["hash"][2] == ""
