"""Data-parallel MEM-REC tables on gloo ranks: what row-wise ones learn, with a dense optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models, tasks
from tests.distributed.ranks import run_ranks

ROWS, WEIGHTS = (
    "embedding_bags.memrec_pool_t_big.weight",
    "embedding_bags.memrec_pool_t_big.weight_table",
)


def _replicas(kind: str, **options: Any) -> tuple[DistributedModelParallel, KeyedOptimizerWrapper]:
    """A model whose tables are replicated, and the optimizer of what is not trained in backward."""
    model = tasks.all_of(kind, EmbOptimType.EXACT_SGD, "data_parallel", **options)
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    assert {ROWS, WEIGHTS} <= parameters.keys()
    optimizer = KeyedOptimizerWrapper(parameters, lambda given: torch.optim.SGD(given, lr=0.1))
    return model, optimizer


def _set_rows(model: DistributedModelParallel) -> None:
    """Token rows as :func:`models.set_weights` sets those of sharded tables."""
    rows = model.state_dict()[ROWS]
    rows.copy_(models.pattern(torch.arange(len(rows)), rows.shape[1], ROWS))


def _learn(kind: str, weighted: bool) -> dict[str, Tensor]:
    model, optimizer = _replicas(kind, is_weighted=weighted)
    _set_rows(model)
    for batch, pull in tasks.pulls(kind, weighted):
        optimizer.zero_grad()
        (model(batch).values() * pull).sum().backward()
        optimizer.step()
    state = model.state_dict()
    assert not any(hasattr(value, "local_shards") for value in state.values())
    return {name: state[name].clone() for name in (ROWS, WEIGHTS)}


@pytest.mark.parametrize(
    ("kind", "weighted"), [("mem_rec", False), ("mem_rec", True), ("mem_rec_sample", False)]
)
def test_replicas_learn_what_row_wise_tables_do(tmp_path: Path, kind: str, weighted: bool):
    (alone,) = run_ranks(1, tmp_path / "alone", tasks.learn, kind, weighted)
    for state in run_ranks(2, tmp_path / "replicas", _learn, kind, weighted):
        for name in (ROWS, WEIGHTS):
            torch.testing.assert_close(state[name], alone[name], msg=name)


def _inferred(per: str) -> None:
    """With gradients and without, the same; means are divided once."""
    sizes = {"t_big": 500, "t_small": 31}
    pooling = PoolingType.MEAN if per == "token" else PoolingType.SUM
    kind = tc.MemRec(compression=2, per=per)
    replicated = tc.ParameterConstraints(table=kind, sharding_types=["data_parallel"])
    row_wise = tc.ParameterConstraints(table=kind)
    module = models.collection(sizes, pooling=pooling)
    replicas = models.sharded(module, dict.fromkeys(sizes, replicated))
    sharded = models.sharded(module, dict.fromkeys(sizes, row_wise))
    models.set_weights(sharded)
    _set_rows(replicas)
    assert tc.resident_bytes(replicas) == tc.resident_bytes(sharded) * dist.get_world_size()
    for batch in models.batches(2, 8, sizes):
        pooled = replicas(batch).values()
        torch.testing.assert_close(pooled, sharded(batch).values())
        with torch.no_grad():
            torch.testing.assert_close(replicas.eval()(batch).values(), pooled)
        replicas.train()
        pooled.sum().backward()


@pytest.mark.parametrize("per", ["token", "sample"])
def test_replicas_give_what_row_wise_tables_do(tmp_path: Path, per: str):
    run_ranks(2, tmp_path, _inferred, per)


def _load(folder: str) -> dict[str, Tensor]:
    model, _ = _replicas("mem_rec")
    loaded = {"model": {name: model.state_dict()[name] for name in (ROWS, WEIGHTS)}}
    dcp.load(loaded, checkpoint_id=folder)
    model.load_state_dict(loaded["model"], strict=False)
    return {name: value.clone() for name, value in loaded["model"].items()}


def test_a_row_wise_checkpoint_loads_into_replicas(tmp_path: Path):
    folder = str(tmp_path / "checkpoint")
    saved = run_ranks(2, tmp_path / "save", tasks.save, folder, "mem_rec")
    for loaded in run_ranks(2, tmp_path / "load", _load, folder):
        for name in (ROWS, WEIGHTS):
            assert torch.equal(loaded[name], torch.cat([part[name] for part in saved])), name


@pytest.mark.parametrize("kind", ["cafe", "quotient_remainder"])
def test_other_kinds_have_no_replicas(kind: str):
    constraint = tc.ParameterConstraints(table=models.KINDS[kind], sharding_types=["data_parallel"])
    with pytest.raises(ValueError, match="table 't_big': a .* table can be sharded row_wise or"):
        models.planner({"t_big": constraint}, 2)


def _shardings() -> dict[str, Any]:
    """A table of each sharding."""
    cafe = models.CAFE
    return {
        "t_big": tc.ParameterConstraints(table=cafe),
        "t_small": tc.ParameterConstraints(
            table=tc.Hash(compression=2), sharding_types=["table_wise"]
        ),
        "t_hash": tc.ParameterConstraints(
            table=tc.MemRec(compression=7), sharding_types=["data_parallel"]
        ),
        "t_fused": tc.ParameterConstraints(
            table=tc.Cafe(compression=3, num_shards=2), sharding_types=["table_wise"]
        ),
    }


class _Sum(nn.Module):
    """Looks up, and pulls every vector towards one."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = models.collection()

    def forward(self, batch: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        loss = (self.tables(batch).values() - 1).pow(2).sum(1).mean()
        return loss, loss.detach()


def _loops() -> tuple[list[float], list[float]]:
    """Losses of TorchRec's pipeline, and of a plain loop."""
    losses: list[list[float]] = []
    for pipelined in (True, False):
        torch.manual_seed(0)
        model = models.sharded(_Sum(), _shardings(), EmbOptimType.EXACT_SGD)
        dense = KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(model.named_parameters())),
            lambda given: torch.optim.SGD(given, lr=0.5),
        )
        models.set_weights(model)
        batches = models.batches(20, 16)
        losses.append([])
        if pipelined:
            pipeline = TrainPipelineSparseDist(model, dense, torch.device("cpu"))
            for _ in range(20):
                losses[-1].append(float(pipeline.progress(batches)))
            continue
        for batch in batches:
            dense.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            dense.step()
            losses[-1].append(float(loss.detach()))
    return losses[0], losses[1]


def test_every_sharding_trains_in_torchrecs_pipeline(tmp_path: Path):
    for pipelined, plain in run_ranks(2, tmp_path, _loops):
        assert pipelined == pytest.approx(plain, rel=1e-5)
        assert sum(pipelined[-5:]) < 0.8 * sum(pipelined[:5])
