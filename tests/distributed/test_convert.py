"""Checkpoints of stock TorchRec in compressed tables, on gloo ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from torchrec_cafe.distributed import conversion

CAFE = dataclasses.replace(models.CAFE, medium_fraction=0.3, half_life=4000)
KINDS: dict[str, Any] = {
    "cafe": models.CAFE,
    "factors": dataclasses.replace(CAFE, num_weight_hashes=3, weight_fraction=0.1),
    "on one rank": models.CAFE,
    "hash": models.HASH,
    "whole": tc.Hash(compression=1),
}
OPTIMIZERS = {
    "rowwise": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ebc = models.collection()
        self.dense = nn.Linear(32, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.dense(self.ebc(features).values())


def counts() -> dict[str, tc.IdCounts]:
    ids = torch.rand(20000, generator=torch.Generator().manual_seed(0)) ** 4 * 5000
    return {"t_big": tc.IdCounts.of(ids.long())}


def _save(folder: str, optimizer: str) -> dict[str, Tensor]:
    """Train and save with stock TorchRec, t_big cut by columns; what was saved."""
    torch.manual_seed(0)
    big = column_wise(ranks=[0, 1], compute_kernel="fused")
    plans: dict[str, Any] = {
        name: table_wise(rank=1, compute_kernel="fused") for name in models.SIZES
    } | {"t_big": big}
    sharder: Any = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": OPTIMIZERS[optimizer], "learning_rate": 0.1}
    )
    model = Model()
    plan = construct_module_sharding_plan(
        model.ebc, plans, sharder=sharder, local_size=2, world_size=2, device_type="cpu"
    )
    sharded = DistributedModelParallel(
        model, plan=ShardingPlan({"ebc": plan}), sharders=[sharder], device=torch.device("cpu")
    )
    for batch in models.batches(20, 24):
        sharded(batch).pow(2).mean().backward()
    state = {"model": sharded.state_dict(), "optimizer": sharded.fused_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    return _load(folder)


def _load(folder: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in full."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in metadata.items()
        if hasattr(tensor, "size")
    }
    dcp.load(tensors, checkpoint_id=folder)
    return tensors


def _constraints(kind: str) -> dict[str, Any]:
    sharding_type = "table_wise" if kind in ("hash", "on one rank") else "row_wise"
    compressed = tc.ParameterConstraints(table=KINDS[kind], sharding_types=[sharding_type])
    return models.constraints() | dict.fromkeys(("t_big", "t_small"), compressed)


def _convert(folder: str, kinds: list[str], optimizer: str) -> dict[str, dict[str, Any]]:
    """What each kind's model computes and keeps after a conversion, and whether it trains on."""
    results = {}
    for kind in kinds:
        torch.manual_seed(1)
        model = models.sharded(Model(), _constraints(kind), OPTIMIZERS[optimizer])
        for batch in models.batches(2, 24):  # none of this may stay
            model(batch).sum().backward()
        tc.convert(model, folder, counts=counts(), optimizer_key="optimizer")
        tables = tc.gather_tables(model)
        result: dict[str, Any] = {"statistics": [p.statistics() for p in models.pools(model)]}
        for name, table in tables.items():
            ids = torch.arange(table.size[0])
            row_map = table.group.row_map([name])
            rows, starts, _, factors = row_map(ids, torch.arange(len(ids) + 1))
            first = rows[starts[:-1]]
            if not row_map.has_factors:
                factors = torch.ones(len(ids))
            hot = first >= table.group.layout.pool.offset
            result[name] = (table.vectors(ids), first, hot, factors)
        states = model.fused_optimizer.state_dict()["state"]
        result["states"] = {
            key: value.local_shards()[0].tensor.clone()
            for of_table in states.values()
            for key, value in of_table.items()
            if value.local_shards()
        }
        result["local"] = models.local_state(model)
        model.eval()
        result["predictions"] = [model(batch).detach() for batch in models.batches(2, 24, seed=5)]
        model.train()
        for batch in models.batches(10, 24, seed=6):
            model(batch).pow(2).mean().backward()
        result["after"] = [p.statistics() for p in models.pools(model)]
        results[kind] = result
    return results


def _weighted_means(dense: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """The mean of the ids that share a row, for each id."""
    sums = torch.zeros((int(first.max()) + 1, dense.shape[1]), dtype=torch.float64)
    sums.index_add_(0, first, dense.double() * weights.unsqueeze(1))
    total = torch.zeros(len(sums), dtype=torch.float64).index_add_(0, first, weights)
    return (sums[first] / total[first].unsqueeze(1)).float()


# Both optimizers in the same ranks: starting ranks takes longer than most of what they do.


def _save_all(folder: str) -> dict[str, dict[str, Tensor]]:
    return {optimizer: _save(f"{folder}/{optimizer}", optimizer) for optimizer in OPTIMIZERS}


def _convert_all(folder: str) -> dict[str, dict[str, Any]]:
    conversion.CHUNK_BYTES = 10_000 * dist.get_world_size()  # a table has many chunks
    result = _convert(f"{folder}/rowwise", list(KINDS), "rowwise")
    return {"rowwise": result, "adagrad": _convert(f"{folder}/adagrad", ["factors"], "adagrad")}


Saved = tuple[str, dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Folder of the checkpoints, and their tensors by optimizer."""
    path = tmp_path_factory.mktemp("saved")
    folder = str(path / "checkpoints")
    return folder, run_ranks(2, path, _save_all, folder)[0]


def test_conversion_of_a_stock_checkpoint(tmp_path: Path, saved: Saved):
    folder, tensors = saved
    (alone,) = run_ranks(1, tmp_path / "alone", _convert_all, folder)
    both = run_ranks(2, tmp_path / "both", _convert_all, folder)
    for optimizer, of_kinds in alone.items():
        _check_states(of_kinds["factors"], tensors[optimizer])
        for kind, result in of_kinds.items():
            _check(result, tensors[optimizer], kind)
            for other in (part[optimizer][kind] for part in both):
                _check(other, tensors[optimizer], kind)
                for name in ("t_big", "t_small", "t_hash"):
                    for mine, theirs in zip(result[name], other[name], strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def _check(result: dict[str, Any], saved: dict[str, Tensor], kind: str) -> None:
    for name, size in models.SIZES.items():
        if name not in result:
            continue
        dense = saved[f"model.ebc.embedding_bags.{name}.weight"]
        vectors, first, hot, factors = result[name]
        known = counts().get(name, tc.IdCounts.of(torch.empty(0, dtype=torch.int64)))
        weights = known.weights(0, size)
        expected = _weighted_means(dense, first, weights)
        expected[~hot] *= factors[~hot].unsqueeze(1)  # three weights of a third
        torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6, msg=f"{kind}: {name}")
        torch.testing.assert_close(vectors[hot], dense[hot], rtol=1e-6, atol=1e-8)
        if kind == "whole" and name != "t_hash":
            assert torch.equal(vectors, dense)
    for name in ("dense.weight", "dense.bias", "ebc.embedding_bags.t_fused.weight"):
        if name in result["local"]:
            assert torch.equal(result["local"][name], saved[f"model.{name}"])
    if kind in ("hash", "whole"):
        return
    hot = result["t_big"][2]
    most = counts()["t_big"].weights(0, len(hot)).argsort(descending=True)[: int(hot.sum())]
    # Each virtual shard has its own rows, and few buckets have more hot ids than slots.
    assert hot[most].float().mean() > 0.85
    for before, after in zip(result["statistics"], result["after"], strict=True):
        assert before["hot_occupancy"] == 1
        assert (before["medium_occupancy"] > 0) == (kind == "factors")
        assert before["threshold"] > 1
        assert after["hot_occupancy"] == 1
        assert after["demoted"] < 5


def _check_states(result: dict[str, Any], saved: dict[str, Tensor]) -> None:
    """The same of optimizer states, on one rank."""
    _, first, hot, _ = result["t_big"]
    names = ("t_big", "t_small", "cafe_pool_t_big")
    states = torch.cat([result["states"][f"{name}.momentum1"] for name in names])
    dense = saved["optimizer.state.ebc.embedding_bags.t_big.weight.t_big.momentum1"]
    if dense.dim() == 1:  # one after the other for the columns of each rank
        dense = dense.view(2, -1).mean(0).unsqueeze(1)
    states = states.view(len(states), -1)
    weights = counts()["t_big"].weights(0, len(dense))
    torch.testing.assert_close(states[first], _weighted_means(dense, first, weights))
    assert torch.equal(states[first][hot], dense[hot])
    assert (dense > 0).any()


def _refused(folder: str) -> dict[str, str]:
    messages = {}
    model = models.sharded(Model(), _constraints("cafe"))
    before = models.local_state(model)
    other = models.sharded(
        models.collection({"t_big": 4000}),
        {"t_big": tc.ParameterConstraints(table=models.HASH)},
    )
    too_large = {"t_big": tc.IdCounts.of(torch.tensor([5000]))}
    mem_rec = models.sharded(
        models.collection({"t_big": 5000}),
        {"t_big": tc.ParameterConstraints(table=models.KINDS["mem_rec"])},
    )
    adagrad = models.sharded(Model(), _constraints("cafe"), EmbOptimType.EXACT_ADAGRAD)
    cases: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "key": (model, {"model_key": "state"}),
        "table": (model, {"counts": {"t_fused": counts()["t_big"]}}),
        "ids": (model, {"counts": too_large}),
        "both": (model, {"storage_reader": dcp.FileSystemReader(folder)}),
        "shape": (other, {"model_key": "model.ebc"}),
        "kind": (mem_rec, {"model_key": "model.ebc"}),
        "optimizer": (adagrad, {"optimizer_key": "optimizer"}),
    }
    for name, (into, options) in cases.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
            tc.convert(into, folder, **{"counts": {}} | options)
        messages[name] = str(error.value)
    after = models.local_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return messages


def test_what_cannot_be_converted_is_refused(tmp_path: Path, saved: Saved):
    folder = f"{saved[0]}/rowwise"
    expected = {
        "key": "table 't_big': the checkpoint must have 'state.ebc.embedding_bags.t_big.weight', "
        "but has ['model.ebc.embedding_bags.t_big.weight']",
        "table": "counts are of tables ['t_fused'], but the compressed tables",
        "ids": "table 't_big': counted ids must be in [0, 5000), got 5000 to 5000",
        "both": "give checkpoint_id or storage_reader, and not both",
        "shape": "table 't_big': 'model.ebc.embedding_bags.t_big.weight' must have shape [4000, 8]",
        "kind": "table 't_big': only Cafe and Hash tables can be filled from an uncompressed one, "
        "got MemRec",
        "optimizer": "table 't_big': its optimizer keeps states of shapes [[8]] for a row, but",
    }
    for messages in run_ranks(2, tmp_path / "ranks", _refused, folder):
        assert messages.keys() == expected.keys()
        for name, message in messages.items():
            assert message.startswith(expected[name]), (name, message)
