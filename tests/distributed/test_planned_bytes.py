"""What the planner estimates is what a rank allocates: rows, sketch, maps, optimizer state."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.model_parallel import DistributedModelParallel

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks

SIZES = {"t_one": 90_000, "t_two": 60_000, "t_three": 7000}
OPTIMIZERS = (
    EmbOptimType.EXACT_SGD,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    EmbOptimType.EXACT_ADAGRAD,
)


def kinds(folder: str) -> dict[str, Any]:
    return {
        "cafe": tc.Cafe(compression=2, num_shards=16, num_weight_hashes=0),
        "factors": tc.Cafe(compression=2, num_shards=16, num_weight_hashes=3),
        "hash": tc.Hash(compression=2),
        "quotient_remainder": tc.QuotientRemainder(compression=2),
        "mem_rec": tc.MemRec(compression=2, num_shards=16),
        "lookahead": tc.Lookahead(cache_fraction=0.3, min_slots=1),
        "lookahead in files": tc.Lookahead(cache_fraction=0.3, min_slots=1, path=folder),
    }


def _live_bytes() -> int:
    """Bytes of all tensors of this process that Python can reach."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            try:
                storage = thing.untyped_storage()
            except (NotImplementedError, RuntimeError):  # ShardedTensor has none of its own
                continue
            if getattr(storage, "filename", None) is None:  # no memory: pages of a file
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _allocated(
    kind: Any, sharding_type: str, optimizer: EmbOptimType
) -> tuple[DistributedModelParallel, int]:
    constraint = tc.ParameterConstraints(table=kind, sharding_types=[sharding_type])
    planner = models.planner(dict.fromkeys(SIZES, constraint))
    sharders: list[Any] = [models.sharder(optimizer)]
    module = models.collection(SIZES)
    plan = planner.plan(module, sharders)
    planned = 0
    for name, entry in plan.plan[""].items():
        parts = planner._storage_estimator.tables[name].device  # noqa: SLF001
        ranks = (
            entry.ranks if len(parts) > 1 or sharding_type == "table_wise" else [dist.get_rank()]
        )
        planned += sum(
            part for rank, part in zip(ranks, parts, strict=True) if rank == dist.get_rank()
        )
    model = DistributedModelParallel(
        module, plan=plan, sharders=sharders, device=torch.device("cpu")
    )
    return model, planned


def _compare(folder: str, sharding_type: str) -> list[tuple[str, str, int, int]]:
    result = []
    for name, kind in kinds(folder).items():
        for optimizer in OPTIMIZERS if sharding_type == "row_wise" else OPTIMIZERS[1:2]:
            if sharding_type == "data_parallel" and name != "mem_rec":
                continue
            before = _live_bytes()
            model, planned = _allocated(kind, sharding_type, optimizer)
            live = _live_bytes() - before
            if sharding_type == "data_parallel":
                optimizer = EmbOptimType.NONE  # the dense one, which is not ours
            result.append((name, optimizer.name, planned, live))
            del model
    return result


@pytest.mark.parametrize(
    "sharding_type", ["row_wise", "table_wise", "table_row_wise", "data_parallel"]
)
def test_estimated_bytes_are_those_allocated(tmp_path: Path, sharding_type: str):
    ranks, hosts = (4, 2) if sharding_type == "table_row_wise" else (2, 1)
    folder = str(tmp_path / "rows")
    parts = run_ranks(ranks, tmp_path / "ranks", _compare, folder, sharding_type, num_hosts=hosts)
    for rank, part in enumerate(parts):
        for name, optimizer, planned, live in part:
            text = f"{name}, {optimizer}, rank {rank}: planned {planned}, allocated {live}"
            assert live == pytest.approx(planned, rel=0.05, abs=40_000), text
