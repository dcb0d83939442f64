"""Checkpoints of sequences with compressed tables: any ranks, any sharding, any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer

import torchrec_cafe as tc
from tests.distributed import models, sequences
from tests.distributed.ranks import run_ranks
from torchrec_cafe.distributed.layout import parse_layout_key

ROWWISE = EmbOptimType.EXACT_ROWWISE_ADAGRAD
#: tables by kind; those without one are TorchRec's own
TABLES: dict[str, Any] = {f"t_{kind}": models.KINDS[kind] for kind in sequences.KINDS} | {
    "t_hash": models.HASH,
    "t_own": None,
}
SIZES = {name: 600 + 100 * number for number, name in enumerate(TABLES)}


def build(sharding_type: str) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    constraints = {
        name: tc.ParameterConstraints(table=kind, sharding_types=[sharding_type])
        for name, kind in TABLES.items()
    }
    model = sequences.sharded(sequences.collection(SIZES), constraints)
    optimizer = CombinedOptimizer([model.fused_optimizer])
    optimizer.init_state()
    return {"model": model, "optimizer": optimizer}


def train(state: dict[str, Any], steps: int, seed: int) -> None:
    for batch in models.batches(steps, 48 // dist.get_world_size(), SIZES, seed=seed):
        found = state["model"](batch)
        pull = (1 + batch.values() % 5).float()[:, None] * 0.02 * dist.get_world_size()
        (sequences.vectors(found, batch) * pull).sum().backward()


def tables(state: dict[str, Any]) -> dict[str, Tensor]:
    """The vectors of all ids of the tables with a kind, and the counters of the sketches."""
    views = tc.gather_tables(state["model"])
    return {name: view.vectors(torch.arange(SIZES[name])) for name, view in views.items()}


def _save(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What was saved, and what a rank has some steps later, by going on and by loading."""
    manager = tc.CheckpointManager(folder)
    state = build("row_wise")
    train(state, 12, seed=0)
    manager.save(state, 12)
    saved = tables(state)
    train(state, 6, seed=1)
    gone_on = models.local_state(state["model"])
    other = build("row_wise")
    assert manager.load(other) == 12
    train(other, 6, seed=1)
    return saved, gone_on, models.local_state(other["model"])


def _load(folder: str, sharding_type: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = build(sharding_type)
    assert tc.CheckpointManager(folder).load(state) == 12
    loaded = tables(state)
    train(state, 6, seed=1)
    return loaded, tables(state)


def test_any_ranks_load_what_two_have_saved_and_go_on(tmp_path: Path):
    folder = str(tmp_path / "checkpoints")
    results = run_ranks(2, tmp_path / "saved", _save, folder)
    saved, *_ = results[0]
    for _, gone_on, loaded in results:
        assert gone_on.keys() == loaded.keys()
        for name, value in gone_on.items():
            assert torch.equal(value, loaded[name]), name
    ((alone, after),) = run_ranks(1, tmp_path / "alone", _load, folder, "row_wise")
    others = run_ranks(2, tmp_path / "others", _load, folder, "table_wise")
    for found, _ in (*others, (alone, after)):
        assert found.keys() == saved.keys() == TABLES.keys() - {"t_own"}
        for name, value in saved.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
    for _, later in others:
        for name, value in after.items():
            torch.testing.assert_close(later[name], value, rtol=1e-4, atol=1e-6, msg=name)


def _other_kind(folder: str) -> str:
    TABLES["t_cafe"] = tc.Hash(compression=3)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
        tc.CheckpointManager(folder).load(build("row_wise"))
    return str(error.value)


def _save_and_misload(folder: str) -> tuple[str, list[str]]:
    state = build("row_wise")
    tc.CheckpointManager(folder).save(state, 1)
    keys = [key for key in state["model"].state_dict() if parse_layout_key(key)]
    return _other_kind(folder), keys


def test_another_kind_is_refused_before_anything_is_loaded(tmp_path: Path):
    for message, keys in run_ranks(2, tmp_path / "ranks", _save_and_misload, str(tmp_path / "c")):
        assert "nothing has been loaded" in message
        assert "table 't_cafe': the checkpoint has it as cafe, the model as hash" in message
        assert "embeddings.t_cafe.cafe_v2" in keys


SMALL = {"t_big": 5000, "t_own": 300}


def _stock(**options: Any) -> Any:
    own = tc.ParameterConstraints(sharding_types=["row_wise"])
    return sequences.sharded(sequences.collection(SMALL), dict.fromkeys(SMALL, own), **options)


def _compressed() -> Any:
    return sequences.sharded(
        sequences.collection(SMALL),
        {
            "t_big": tc.ParameterConstraints(table=models.CAFE),
            "t_own": tc.ParameterConstraints(sharding_types=["table_wise"]),
        },
    )


def _there_and_back(folder: str) -> tuple[float, float]:
    """How far ids with a row of their own are after a conversion, and all ids after an export."""
    stock = _stock()
    for batch in models.batches(10, 24, SMALL):
        sequences.vectors(stock(batch), batch).pow(2).sum().backward()
    dcp.save({"model": stock.state_dict()}, checkpoint_id=f"{folder}/dense")
    model = _compressed()
    ids = torch.rand(20000, generator=torch.Generator().manual_seed(0)) ** 4 * 5000
    tc.convert(model, f"{folder}/dense", counts={"t_big": tc.IdCounts.of(ids.long())})
    view = tc.gather_tables(model)["t_big"]
    row_map = view.group.row_map(["t_big"])
    rows, starts, *_ = row_map(torch.arange(5000), torch.arange(5001))
    hot = (rows[starts[:-1]] >= view.group.layout.pool.offset).nonzero().view(-1)
    assert len(hot) > 20
    # Each rank asks for the same ids; a rank's part of the answer is its own.
    lengths = torch.tensor([len(hot), 0])
    batch = sequences.KeyedJaggedTensor(keys=["f_big", "f_own"], values=hot, lengths=lengths)
    with torch.no_grad():
        converted = model(batch)["f_big"].values()
        exact = stock(batch)["f_big"].values()
    near = float((converted - exact).abs().max())

    dcp.save(
        {"model": tc.dense_state_dict(model)},
        checkpoint_id=f"{folder}/exported",
        planner=tc.DenseSavePlanner(),
    )
    other = _stock()
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/exported")
    other.load_state_dict(state["model"])
    far = 0.0
    model.eval()
    with torch.no_grad():
        for batch in models.batches(3, 24, SMALL, seed=3):
            ours, theirs = model(batch), other(batch)
            for key in batch.keys():  # noqa: SIM118  it is no mapping
                difference = (ours[key].values() - theirs[key].values()).abs()
                far = max(far, float(difference.max()) if difference.numel() else 0.0)
    return near, far


def test_stock_checkpoints_are_converted_and_exported(tmp_path: Path):
    for near, far in run_ranks(2, tmp_path / "ranks", _there_and_back, str(tmp_path / "out")):
        assert near < 1e-6
        assert far < 1e-6
