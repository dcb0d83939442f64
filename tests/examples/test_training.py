"""Validation, early stopping and evaluation, on real ranks."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.dlrm.config import parse_args
from examples.dlrm.data import hold_out, load_click_log
from examples.dlrm.data.generator import write_generated
from examples.dlrm.early_stopping import EarlyStopping
from examples.dlrm.evaluation import Figures
from examples.dlrm.loop import Training, cases
from tests.distributed.ranks import run_ranks

SIZES = (3000, 12, 2000, 400)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a small log lies in place of the generator's."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "generator-v1"
    folder.mkdir()
    write_generated(folder, 6000, 2000, num_embeddings=SIZES)
    return cache


def do(what: str, flags: list[str], changed: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Train, or restore, and test, as the programs do, in a process group that is there."""
    config = parse_args(flags)
    log = load_click_log("generator", cache_dir=Path(config.cache_dir), progress=False)
    log = hold_out(log, 0.2) if "held out" in what else log
    if changed:
        sizes = zip(log.features, changed, strict=True)
        features = tuple(feature._replace(num_embeddings=size) for feature, size in sizes)
        log = replace(log, features=features)
    results = []
    for case in cases(config):
        training = Training(config, log, case)
        if "restore" in what:
            training.restore()
        else:
            training.train()
        result = asdict(training.test())
        if "profile" in what:
            result["step_parts"] = training.profile(2)
        results.append(result | {"rank": dist.get_rank()})
    return results


def flags_of(cache: Path, out: Path, *more: str) -> list[str]:
    made = {"data": "generator", "cache_dir": cache, "out": out, "batch_size": 100}
    made |= {"compression": 4, "learning_rate": 0.2, "over_arch": 32}
    return [part for k, v in made.items() for part in (f"--{k}", str(v))] + list(more)


def scalars(out: Path, label: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(out / "tensorboard" / label)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


METRICS = ("auc", "log_loss", "normalized_entropy")


def metrics(result: dict[str, Any]) -> list[float]:
    return [result[name] for name in METRICS]


def test_figures_are_what_their_names_say():
    torch.manual_seed(0)
    labels = (torch.rand(1000) < 0.2).float()
    logits = torch.randn(1000) + labels
    figures = Figures.of(logits, labels)
    rate = labels.double().mean()
    entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    assert figures.normalized_entropy == pytest.approx(figures.log_loss / float(entropy), rel=1e-9)
    best = Figures.of(torch.full((1000,), float((rate / (1 - rate)).log())), labels)
    assert best.normalized_entropy == pytest.approx(1, rel=1e-6)
    assert best.auc == 0.5


def test_stops_after_validations_in_vain():
    early = EarlyStopping(2)
    better = [early.update(step, loss) for step, loss in enumerate([0.5, 0.4, float("nan")], 1)]
    assert better == [True, True, False]
    assert not early.stopped
    resumed = EarlyStopping(2)
    resumed.load_state_dict(early.state_dict())
    assert not resumed.update(4, 0.4)
    assert resumed.stopped
    assert resumed.best_step == 2


def test_the_last_training_rows_are_held_out(cache: Path):
    log = load_click_log("generator", cache_dir=cache)
    held = hold_out(log, 0.25)
    assert held.validation is not None
    assert (len(held.train), len(held.validation)) == (4500, 1500)
    assert held.validation.ids[0].tolist() == log.train.ids[4500].tolist()
    assert held.test is log.test
    for share in (0.0, 1.0, 1e-9):
        with pytest.raises(ValueError, match="`share` must be above 0 and below 1"):
            hold_out(log, share)


@pytest.mark.slow
def test_validations_change_nothing_of_the_training(cache: Path, tmp_path: Path):
    """Nor do they with rows that are brought in ahead, and what a step costs is told apart."""
    flags = flags_of(cache, tmp_path, "--kinds", "cafe,lookahead", "--lookahead", "min_slots=400")
    without = run_ranks(2, tmp_path / "a", do, "train held out", flags)[0]
    out = tmp_path / "with"
    flags = [*flags, "--validate_every", "5", "--out", str(out)]
    found = run_ranks(2, tmp_path / "b", do, "train held out, profile", flags)
    for before, after in zip(without, found[0], strict=True):
        assert metrics(before) == metrics(after)
        assert (after["tested"], after["tested_step"]) == ("last", 24)
    assert [metrics(r) for r in found[0]] == [metrics(r) for r in found[1]]
    written = scalars(out, "cafe_4x")
    for name in METRICS:
        assert [samples for samples, _ in written[f"validation/{name}"]] == [1000, 2000, 3000, 4000]
    parts = found[0][0]["step_parts"]
    assert {"dense layers", "FBGEMM forward", "torchrec_cafe::learn", "input dist"} <= set(parts)
    assert all(value >= 0 for value in parts.values())


@pytest.mark.slow
def test_stops_early_and_tests_the_best(cache: Path, tmp_path: Path):
    """So does a training that was stopped in between, and an evaluation, to the last bit."""
    tiring = ("--epochs", "20", "--dense_learning_rate", "0.03", "--kinds", "cafe")
    stop = ("--validate_every", "12", "--early_stopping", "2")
    flags = flags_of(cache, tmp_path / "last", *tiring, *stop)
    (last,) = run_ranks(1, tmp_path / "a", do, "train held out", flags)[0]
    assert last["tested"] == "last"
    assert last["tested_step"] < 20 * 48
    losses = scalars(tmp_path / "last", "cafe_4x")["validation/log_loss"]
    steps = [samples // 100 for samples, _ in losses]
    values = [value for _, value in losses]
    assert steps[-1] == last["tested_step"]
    assert len(values) - 1 - values.index(min(values)) == 2

    saved = tmp_path / "saved"
    flags += ["--checkpoint_dir", str(saved), "--checkpoint_every", "5"]
    (whole,) = run_ranks(1, tmp_path / "b", do, "train held out", flags)[0]
    assert whole["tested"] == "best"
    assert whole["tested_step"] == steps[values.index(min(values))]
    assert metrics(whole) != metrics(last)

    pieces = [str(tmp_path / "pieces") if part == str(saved) else part for part in flags]
    until = ["--max_steps", str(steps[-1] - 7)]
    run_ranks(1, tmp_path / "c", do, "train held out", [*pieces, *until])
    (resumed,) = run_ranks(1, tmp_path / "d", do, "train held out", pieces)[0]
    assert metrics(resumed) == metrics(whole)
    (through,) = run_ranks(1, tmp_path / "e", do, "train held out", pieces)[0]
    assert metrics(through) == metrics(whole)

    (restored,) = run_ranks(1, tmp_path / "f", do, "restore", flags)[0]
    assert metrics(restored) == metrics(whole)
    assert restored["tested_step"] == whole["tested_step"]


@pytest.mark.slow
def test_what_was_saved_is_evaluated_on_any_number_of_ranks(cache: Path, tmp_path: Path):
    saved = tmp_path / "saved"
    flags = flags_of(cache, tmp_path, "--kinds", "full,cafe,mem_rec,lookahead")
    flags += ["--lookahead", "min_slots=400", "--checkpoint_dir", str(saved)]
    trained = run_ranks(2, tmp_path / "a", do, "train", flags)[0]
    for ranks in (1, 2):
        restored = run_ranks(ranks, tmp_path / f"r{ranks}", do, "restore", flags)[0]
        for before, after in zip(trained, restored, strict=True):
            assert after["samples_per_second"] > 0
            if ranks == 2:
                assert metrics(before) == metrics(after)
            assert metrics(before) == pytest.approx(metrics(after), rel=1e-5)
    with pytest.raises(
        AssertionError, match=r"(?s)ValueError: the checkpoint does not fit.*t_cat_0"
    ):
        run_ranks(2, tmp_path / "b", do, "restore", flags, (3001, 12, 2000, 400))
    elsewhere = ["--checkpoint_dir", str(tmp_path / "nowhere"), "--kinds", "cafe"]
    with pytest.raises(
        AssertionError, match="FileNotFoundError: .*nowhere/cafe_4x has no complete"
    ):
        run_ranks(2, tmp_path / "c", do, "restore", [*flags, *elsewhere])
