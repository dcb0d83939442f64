"""Look-ahead tables on a GPU under TorchRec, NCCL and every pipeline; see test_lookahead.py."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.modules.embedding_configs import PoolingType

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from tests.distributed.test_lookahead import (
    KIND,
    SIZES,
    dense_optimizer,
    everything,
    optimizers,
    sharded,
    train,
)
from torchrec_cafe.tables import ScratchpadFullError

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
DRIVERS = ("loop", "torchrec", "prefetch", 1, 2, 3, 4)


def _against_torchrec(sharding_type: str) -> list[str]:
    """What differs, for all optimizers and pipelines."""
    differs = []
    data = list(models.batches(100, 24, SIZES))
    for optimizer in (*optimizers(), EmbOptimType.ADAM):
        options: dict[str, Any] = {"sharding_type": sharding_type, "device": CUDA}
        if optimizer is EmbOptimType.EXACT_ADAGRAD:
            options["pooling"] = PoolingType.MEAN
        whole = sharded(None, optimizer, **options)
        said = train(whole, "loop", data)
        expected = everything(whole)
        for driver in DRIVERS:
            model = sharded(KIND, optimizer, **options)
            case = f"{optimizer.name}, {driver}"
            if not torch.equal(train(model, driver, data), said):
                differs.append(f"{case}: outputs")
            got = everything(model)
            assert got.keys() == expected.keys()
            assert all(tensor.is_cuda for tensor in got.values())
            differs += [f"{case}: {n}" for n in got if not torch.equal(got[n], expected[n])]
            for statistics in tc.lookahead_statistics(model).values():
                ahead = isinstance(driver, int) or driver == "prefetch"
                if (statistics.critical_misses == 0) != ahead:
                    differs.append(f"{case}: {statistics}")
    return differs


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_wise"])
def test_any_pipeline_gives_torchrecs_tables(tmp_path: Path, sharding_type: str):
    (differs,) = run_ranks(1, tmp_path, _against_torchrec, sharding_type, backend="nccl")
    assert differs == []


def _checkpoints(folder: str) -> list[bool]:
    """Checkpoints in mid-stream change nothing, and load into either kind of table."""
    data = list(models.batches(20, 12, SIZES))
    results = []
    for kind in (None, KIND):
        model = sharded(kind, device=CUDA)
        pipeline = tc.LookaheadTrainPipeline(model, dense_optimizer(model), CUDA, depth=3)
        batches, said = iter(data), []
        for number in range(20):
            said.append(pipeline.progress(batches).detach())
            if number == 9:
                dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/{kind is None}")
        results.append((torch.stack(said), everything(model)))
    (said, expected), (ours, got) = results
    same = [torch.equal(said, ours), *(torch.equal(got[name], expected[name]) for name in expected)]
    loaded = []
    for kind in (KIND, None):  # each loads what the other has saved
        model = sharded(kind, device=CUDA)
        train(model, "loop", list(models.batches(3, 12, SIZES, seed=2)))
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{kind is not None}")
        model.load_state_dict(state["model"])
        loaded.append(models.local_state(model))
    return same + [torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0]]


def test_checkpoints_in_mid_stream(tmp_path: Path):
    (same,) = run_ranks(1, tmp_path / "ranks", _checkpoints, str(tmp_path), backend="nccl")
    assert len(same) > 3
    assert all(same)


def _go_on_after_a_failed_batch() -> list[float]:
    kind = dataclasses.replace(KIND, cache_fraction=0.01, min_slots=60)
    model = sharded(kind, sharding_type="table_wise", device=CUDA)
    data = list(models.batches(9, 8, SIZES))
    data[4] = next(models.batches(1, 600, SIZES))
    pipeline = tc.LookaheadTrainPipeline(model, dense_optimizer(model), CUDA, depth=3)
    batches = iter(data)
    trained = [float(pipeline.progress(batches).sum()) for _ in range(4)]
    with pytest.raises(ScratchpadFullError, match="distinct rows, and the scratchpad has 60 slots"):
        pipeline.progress(batches)
    return trained + [float(pipeline.progress(batches).sum()) for _ in range(4)]


def test_a_pipeline_goes_on_after_a_failed_batch(tmp_path: Path):
    (trained,) = run_ranks(1, tmp_path, _go_on_after_a_failed_batch, backend="nccl")
    assert len(trained) == 8
    assert all(map(math.isfinite, trained))
