"""Checkpoints that are damaged, of something else or half written, and those in mid-training."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import torchrec_cafe as tc
from tests.distributed import checkpoint_tasks as tasks
from tests.distributed.ranks import run_ranks
from torchrec_cafe.distributed import layout


def _error(call: Callable[[], Any]) -> str:
    """Type and message of the error that a call must raise."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  the test looks at it
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def _managing(folder: str) -> None:
    manager = tc.CheckpointManager(folder, keep=2)
    assert manager.latest() is None
    state = {"here": torch.zeros(2), "step": 0}
    assert "has no complete checkpoint; it has []" in _error(lambda: manager.load(state))
    for step in (3, 5, 10):
        manager.save({"here": torch.full((2,), float(step)), "step": step}, step)
    assert manager.steps() == [5, 10]
    assert "not overwritten" in _error(lambda: manager.save(state, 10))
    assert "step must be >= 0, got -1" in _error(lambda: manager.async_save(state, -1))
    assert "no complete checkpoint of step 3" in _error(lambda: manager.load(state, 3))
    if dist.get_rank() == 0:  # what saves leave that have died
        (Path(folder) / "step_7").mkdir()
        half = Path(folder) / "step_12"
        shutil.copytree(Path(folder) / "step_10", half)
        (half / ".metadata").rename(half / ".metadata.tmp")
    dist.barrier()
    assert manager.latest() == 10
    assert (manager.load(state), state["step"]) == (10, 10)
    assert (manager.load(state, 5), state["here"].tolist()) == (5, [5, 5])
    manager.async_save({"here": torch.full((2,), 12.0), "step": 12}, 12)
    manager.wait()
    assert (manager.load(state), state["step"]) == (12, 12)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["step_10", "step_12"]


def test_the_newest_complete_checkpoints_are_kept(tmp_path: Path):
    run_ranks(2, tmp_path / "ranks", _managing, str(tmp_path / "checkpoints"))
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        tc.CheckpointManager(tmp_path, keep=0)


def _built(tables: dict[str, Any] = tasks.TABLES) -> dict[str, Any]:
    """A new model with an optimizer that has its state."""
    model, optimizer = tasks.build("row_wise", tables)
    optimizer.init_state()
    return {"model": model, "optimizer": optimizer}


def _refused(folder: str, tables: dict[str, Any], **sizes: int) -> str:
    """The error that loading into a model of other tables raises, which changes nothing of it."""
    usual = dict(tasks.SIZES)
    tasks.SIZES.update(sizes)
    state = _built(tables)
    tasks.SIZES.update(usual)
    before = tasks.whole_state(**state)
    message = _error(lambda: tc.CheckpointManager(folder).load(state))
    for name, tensor in tasks.whole_state(**state).items():
        assert torch.equal(tensor, before[name]), name
    return message


def _damage(folder: Path, what: str) -> None:
    """Cut a file of a checkpoint, or remove it."""
    if dist.get_rank() == 0:
        file = sorted(folder.glob("*.distcp"))[-1]
        if what == "metadata":
            file = folder / ".metadata"
            file.write_bytes(file.read_bytes()[:100])
        elif what == "cut":
            os.truncate(file, file.stat().st_size - 1)
        else:
            file.unlink()
    dist.barrier()


def _load_by_dcp(folder: str, tables: dict[str, Any]) -> None:
    """As one does without a manager."""
    try:
        dcp.load({"model": _built(tables)["model"]}, checkpoint_id=f"{folder}/step_12")
    except dcp.CheckpointException as error:
        raise RuntimeError(str(error)) from error


def _bad_checkpoints(folder: str) -> dict[str, str]:
    model, optimizer = tasks.build("row_wise")
    state = {"model": model, "optimizer": optimizer}
    tasks.train(model, optimizer, tasks.batches(3))
    manager = tc.CheckpointManager(folder)
    manager.save(state, 12)
    tables = tasks.TABLES
    quotient = tables | {"t_hash": tables["t_quotient"]}
    factors = dataclasses.replace(tables["t_factors"], compression=6)
    found = {
        "another kind": _refused(folder, quotient),
        "no kind": _refused(folder, tables | {"t_hash": None}),
        "other shapes": _refused(folder, tables | {"t_factors": factors}),
        # As many rows, but ids that are mixed in another way.
        "another size": _refused(folder, tables, t_hash=701),
        "a plain table's size": _refused(folder, tables, t_own=401),
        "dcp": _error(lambda: _load_by_dcp(folder, tables | {"t_hash": tables["t_cafe"]})),
    }
    model, optimizer = tasks.build("row_wise")
    state = {"model": model, "optimizer": optimizer}
    found["no state"] = _error(lambda: manager.load(state))
    for what in ("cut", "missing", "metadata"):
        _damage(Path(folder) / "step_12", what)
        found[what] = _refused(folder, tables)
    return found


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path):
    for found in run_ranks(2, tmp_path / "ranks", _bad_checkpoints, str(tmp_path / "c")):
        for name, parts in {
            "another kind": ["ValueError", "'t_hash'", "as hash", "as quotient_remainder"],
            "no kind": ["ValueError", "'t_hash'", "as hash, the model as TorchRec's own"],
            "other shapes": ["ValueError", "'t_factors'", "shared_rows"],
            "another size": ["ValueError", "'t_hash'", "num_embeddings 700 instead of 701"],
            "a plain table's size": ["ValueError", "'t_own'", "[400, 8], the model [401, 8]"],
            "dcp": ["Size mismatch", "cafe_pool_t_cafe"],
            "no state": ["ValueError", "init_state()"],
            "cut": ["ValueError", "damaged", "bytes of at least", "nothing has been loaded"],
            "missing": ["ValueError", "damaged", "is missing", "nothing has been loaded"],
            "metadata": ["ValueError", "damaged", ".metadata cannot be read"],
        }.items():
            for part in parts:
                assert part in found[name], (name, found[name])


def _of_format(folder: str, difference: int) -> str:
    state = _built()
    layout.FORMAT += difference
    tc.CheckpointManager(folder).save(state, 1)
    layout.FORMAT -= difference
    return _error(lambda: tc.CheckpointManager(folder).load(state))


@pytest.mark.parametrize(
    ("difference", "remedy"),
    [(1, "install the version that wrote it"), (-1, "load it with the version that wrote it")],
)
def test_another_format_is_refused(tmp_path: Path, difference: int, remedy: str):
    folder = str(tmp_path / "c")
    (message,) = run_ranks(1, tmp_path / "ranks", _of_format, folder, difference)
    written = layout.FORMAT + difference
    assert f"table 't_cafe': the checkpoint has format {written} of cafe" in message
    assert f"reads format {layout.FORMAT}; {remedy}" in message


class _Dies:
    """Kills the process that writes it."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def _die_in_a_save(folder: str) -> None:
    state = _built()
    tasks.train(state["model"], state["optimizer"], tasks.batches(2))
    manager = tc.CheckpointManager(folder, timeout=timedelta(seconds=20))
    manager.save(state, 1)
    whole = tasks.whole_state(**state)
    if dist.get_rank() == 0:
        torch.save(whole, Path(folder) / "whole.pt")
    tasks.train(state["model"], state["optimizer"], tasks.batches(2))
    manager.save(state | {"dies": _Dies()}, 2)


def _go_on_after_it(folder: str) -> None:
    state = _built()
    manager = tc.CheckpointManager(folder)
    assert manager.load(state) == 1
    expected = torch.load(Path(folder) / "whole.pt")
    for name, tensor in tasks.whole_state(**state).items():
        assert torch.equal(tensor, expected[name]), name
    manager.save(state, 2)  # in place of what the dead one has left
    assert manager.steps() == [1, 2]


def test_a_save_that_dies_leaves_the_one_before_it(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(AssertionError):  # a rank has died
        run_ranks(2, tmp_path / "dies", _die_in_a_save, str(folder))
    assert (folder / "step_2").is_dir()
    run_ranks(2, tmp_path / "goes on", _go_on_after_it, str(folder))


def _stream(folder: str, mode: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and end of a training that looks ahead, from step 8 on if it is resumed."""
    state = _built()
    model, optimizer = state["model"], state["optimizer"]
    manager = tc.CheckpointManager(folder)
    begin = manager.load(state) if mode == "resumed" else 0
    pipeline = tc.LookaheadTrainPipeline(model, optimizer, torch.device("cpu"), depth=3)
    data = tasks.batches(16, skip=begin)
    losses = []
    model.train()
    for step in range(begin, 16):
        if mode == "saved" and step == 8:
            manager.async_save(state, step)
        losses.append(pipeline.progress(data).sum().item())
    manager.wait()
    pipeline.detach()
    return losses, tasks.whole_state(**state)


def test_a_training_goes_on_to_the_last_bit_where_it_was_saved(tmp_path: Path):
    """Also one that looks ahead, saved while it goes on."""
    folder = str(tmp_path / "checkpoints")
    found = {
        mode: run_ranks(2, tmp_path / mode, _stream, folder, mode)
        for mode in ("not saved", "saved", "resumed")
    }
    for rank in range(2):
        losses, end = found["not saved"][rank]
        assert found["saved"][rank][0] == losses
        assert found["resumed"][rank][0] == losses[8:]
        for mode in ("saved", "resumed"):
            for name, tensor in end.items():
                assert torch.equal(found[mode][rank][1][name], tensor), (mode, name)
