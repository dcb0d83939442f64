"""A model of three times the memory, planned in budget mode, trains; all kinds mix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from tests.distributed.test_budget import statistics

#: 21 MiB of plain tables
SIZES = {
    "t_skewed": 200_000,
    "t_steep": 150_000,
    "t_flat": 120_000,
    "t_page": 80_000,
    "t_hash": 60_000,
    "t_parts": 50_000,
    "t_whole": 3000,
}
CAPACITY = sum(SIZES.values()) * 32 // 3 // 2  # of a rank, of two
STEPS = 20


def _asked() -> dict[str, Any]:
    """Kinds that budget mode does not choose; it has the other tables."""
    return {
        "t_page": tc.ParameterConstraints(table=tc.MemRec(compression=100, num_shards=8)),
        "t_hash": tc.ParameterConstraints(table=tc.Hash(compression=20)),
        "t_parts": tc.ParameterConstraints(table=tc.QuotientRemainder(compression=20)),
        "t_whole": tc.ParameterConstraints(sharding_types=["table_wise"]),
    }


def _budgeted(folder: str) -> dict[str, Any]:
    """The plan's choice, by table."""
    auto = tc.Auto(
        allow=(tc.Cafe(compression=1, num_shards=8), tc.Lookahead(path=folder, min_slots=512)),
        stats={
            "t_skewed": statistics(0.97, SIZES["t_skewed"]),
            "t_steep": statistics(0.95, SIZES["t_steep"]),
            "t_flat": statistics(0.05, SIZES["t_flat"]),
        },
        risk_weight=1.0,
    )
    planner = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu", ddr_cap=CAPACITY),
        constraints=_asked(),
        auto=auto,
        batch_size=32,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        debug=False,
    )
    sharders: list[Any] = [models.sharder()]
    plan = planner.collective_plan(models.collection(SIZES), sharders, dist.group.WORLD)
    assert planner.report is not None
    assert max(planner.report.device_bytes_of_ranks) <= CAPACITY
    return plan.plan[""]


class Net(nn.Module):
    """Collections of tables, and a sum over all features."""

    def __init__(self, parts: Iterable[dict[str, int]]) -> None:
        super().__init__()
        self.collections = nn.ModuleList(models.collection(sizes) for sizes in parts)
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(len(SIZES) * 8, generator=generator) * 0.1)

    def forward(self, features: Any) -> Tensor:
        pooled: dict[str, Tensor] = {}
        for collection in self.collections:
            pooled |= collection(features).to_dict()
        vectors = [pooled[name.replace("t_", "f_")] for name in SIZES]
        return torch.cat(vectors, 1) @ self.weight


def _train(parts: list[dict[str, int]], constraints: dict[str, Any]) -> list[float]:
    module = Net(parts)
    sharders: list[Any] = [models.sharder()]
    plan = models.planner(constraints).collective_plan(module, sharders, dist.group.WORLD)
    model = DistributedModelParallel(
        module, plan=plan, sharders=sharders, device=torch.device("cpu")
    )
    _set_weights(model)
    optimizer = torch.optim.SGD(
        [
            p
            for n, p in model.named_parameters()
            if n.endswith("weight") and p.numel() == len(SIZES) * 8
        ],
        lr=0.01,
    )
    losses = []
    for step, batch in enumerate(models.batches(STEPS, 32, SIZES)):
        target = torch.linspace(-1, 1, 32) * (1 + step % 3)
        loss = (model(batch) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _set_weights(model: nn.Module) -> None:
    """Weights by table and row, wherever a table is; a pool by its kind."""
    for name, value in model.state_dict().items():
        if not name.endswith(".weight") or not hasattr(value, "local_shards"):
            continue
        table = name.split(".")[-2].rsplit("_pool_", 1)[0]
        for shard in value.local_shards():
            first = shard.metadata.shard_offsets[0]
            rows = torch.arange(first, first + shard.metadata.shard_sizes[0])
            weights = models.pattern(rows, shard.tensor.shape[1], table) * 0.1
            shard.tensor.copy_(torch.zeros_like(weights) if table == "cafe" else weights)


def _both(folder: str) -> tuple[list[str], list[float], list[float]]:
    entries = _budgeted(f"{folder}/one")
    constraints: dict[str, Any] = _asked()
    for name, entry in entries.items():
        if hasattr(entry, "kind"):
            constraints[name] = tc.ParameterConstraints(
                table=entry.kind, sharding_types=[entry.sharding_type]
            )
        else:
            constraints.setdefault(name, tc.ParameterConstraints(sharding_types=["table_wise"]))
    kinds = [
        type(entry.kind).__name__ if hasattr(entry, "kind") else "plain"
        for entry in entries.values()
    ]
    together = _train([SIZES], constraints)
    apart = dict(constraints)
    for name, constraint in constraints.items():
        if isinstance(constraint.table, tc.Lookahead):  # files of its own
            moved = dataclasses.replace(constraint.table, path=f"{folder}/two")
            apart[name] = dataclasses.replace(constraint, table=moved)
    groups: dict[Any, dict[str, int]] = {}
    for name, constraint in apart.items():
        groups.setdefault((constraint.table, str(constraint.sharding_types)), {})[name] = SIZES[
            name
        ]
    return kinds, together, _train(list(groups.values()), apart)


def test_all_kinds_in_one_collection_train_as_apart(tmp_path: Path):
    ranks = run_ranks(2, tmp_path / "ranks", _both, str(tmp_path / "rows"))
    for kinds, together, apart in ranks:
        assert set(kinds) == {"Cafe", "Lookahead", "MemRec", "Hash", "QuotientRemainder", "plain"}
        assert len(together) == STEPS
        assert all(math.isfinite(loss) for loss in together)
        assert together == apart
