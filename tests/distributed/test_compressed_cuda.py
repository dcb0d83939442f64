"""Compressed tables on a GPU under TorchRec, NCCL and every pipeline, against a loop on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from tests.distributed.test_lookahead import Net, everything, train

pytestmark = pytest.mark.timeout(900)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
DRIVERS = {"cpu": ("torchrec", 2), "cuda": ("loop", "torchrec", "prefetch", 2)}
KINDS = models.KINDS | {"hash": models.HASH}
ROWWISE = EmbOptimType.EXACT_ROWWISE_ADAGRAD


def _sharded(kind: str, optimizer: EmbOptimType, device: str) -> DistributedModelParallel:
    torch.manual_seed(0)
    on = torch.device(device, 0) if device == "cuda" else torch.device(device)
    net = Net(models.collection())
    net.over.to(on)
    constraint = tc.ParameterConstraints(table=KINDS[kind])
    sharders: list[Any] = [models.sharder(optimizer)]
    planner = models.planner(dict.fromkeys(models.SIZES, constraint), compute_device=device)
    plan = planner.collective_plan(net, sharders, dist.group.WORLD)
    model = DistributedModelParallel(net, plan=plan, sharders=sharders, device=on)
    models.set_weights(model)
    return model


def _hot_keys(model: DistributedModelParallel) -> set[int]:
    sketches = [pool.sketch for pool in models.pools(model)]
    return {int(key) for s in sketches for key in s.keys[s.hot_rows >= 0].cpu()}


def _train(
    kind: str, drivers: tuple[str | int, ...], device: str
) -> dict[str | int, tuple[Tensor, dict[str, Tensor], set[int]]]:
    """By way of training: what the model has said, its state, and its hot ids."""
    data = list(models.batches(16, 24))
    found = {}
    for driver in drivers:
        model = _sharded(kind, ROWWISE, device)
        said = train(model, driver, data).cpu()
        state = {name: tensor.cpu() for name, tensor in everything(model).items()}
        found[driver] = said, state, _hot_keys(model)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_pipeline_trains_as_a_loop_on_a_cpu_does(tmp_path: Path, kind: str, device: str):
    (whole,) = run_ranks(1, tmp_path / "cpu", _train, kind, ("loop",), "cpu")
    said, state, hot = whole["loop"]
    assert bool(said.isfinite().all())
    backend = BACKENDS[device]
    (found,) = run_ranks(1, tmp_path, _train, kind, DRIVERS[device], device, backend=backend)
    for driver, (got_said, got_state, got_hot) in found.items():
        assert got_state.keys() == state.keys(), driver
        if device == "cpu":
            assert torch.equal(got_said, said), driver
            assert all(torch.equal(got_state[name], state[name]) for name in state), driver
        # Sums have another order on a GPU: an id at the threshold may own a row or not.
        assert len(got_hot ^ hot) <= 0.05 * len(hot), driver
        torch.testing.assert_close(got_said, said, rtol=0.02, atol=0.02)


def _train_with(optimizer: EmbOptimType, device: str) -> dict[str, Tensor]:
    model = _sharded("factors", optimizer, device)
    data = list(models.batches(60, 24))
    said = train(model, "torchrec", data).cpu()
    promoted = torch.tensor([p["promoted"] for p in tc.pool_statistics(model).values()])
    return {name: t.cpu() for name, t in everything(model).items()} | {
        "said": said,
        "promoted": promoted,
    }


ON_ALL = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD)
ON_CUDA = (*ON_ALL, EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM)


@pytest.mark.parametrize(
    ("device", "optimizer"),
    [
        *(("cpu", optimizer) for optimizer in ON_ALL),
        *(pytest.param("cuda", optimizer, marks=pytest.mark.cuda) for optimizer in ON_CUDA),
    ],
)
def test_every_optimizer_of_the_device_trains(tmp_path: Path, device: str, optimizer: EmbOptimType):
    backend = BACKENDS[device]
    (found,) = run_ranks(1, tmp_path, _train_with, optimizer, device, backend=backend)
    assert int(found.pop("promoted").sum()) > 0
    said = found.pop("said")
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert (said[-10:] - 1).abs().mean() < (said[:10] - 1).abs().mean()


def _state(model: DistributedModelParallel) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}


def _save(folder: str, device: str) -> tuple[Tensor, Tensor]:
    """What a model predicts, that is saved, and goes on to predict."""
    model = _sharded("factors", ROWWISE, device)
    train(model, "loop", list(models.batches(20, 24)))
    predicted = _predict(model)
    dcp.save(_state(model), checkpoint_id=folder)
    return predicted, train(model, "loop", list(models.batches(10, 24, seed=3))).cpu()


def _predict(model: DistributedModelParallel) -> Tensor:
    model.eval()
    with torch.no_grad():
        said = [model(batch.to(model.device))[1].cpu() for batch in models.batches(3, 24, seed=7)]
    model.train()
    return torch.stack(said)


def _load(folder: str, device: str) -> tuple[Tensor, Tensor]:
    model = _sharded("factors", ROWWISE, device)
    state = _state(model)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    model.fused_optimizer.load_state_dict(state["optimizer"])
    return _predict(model), train(model, "loop", list(models.batches(10, 24, seed=3))).cpu()


@pytest.mark.parametrize("saved", DEVICES)
@pytest.mark.parametrize("loaded", DEVICES)
def test_a_checkpoint_goes_from_one_device_to_another(tmp_path: Path, saved: str, loaded: str):
    folder = str(tmp_path / "checkpoint")
    (before,) = run_ranks(1, tmp_path / "save", _save, folder, saved, backend=BACKENDS[saved])
    (after,) = run_ranks(1, tmp_path / "load", _load, folder, loaded, backend=BACKENDS[loaded])
    if saved == loaded == "cpu":
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1])
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[1], before[1], rtol=0.02, atol=0.02)
