"""MEM-REC tables on gloo ranks; what they share with other kinds is in test_training.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks

SIZES = {"t_big": 5000, "t_small": 12}


def _inferred(per: str) -> Tensor:
    """What a model gives without gradients, after some steps; four shards, which is few."""
    few = tc.MemRec(compression=5, num_shards=4, per=per)
    kinds = {name: tc.ParameterConstraints(table=few) for name in SIZES}
    model = models.sharded(models.collection(SIZES), kinds, EmbOptimType.EXACT_SGD)
    models.set_weights(model)
    batch_size = 12 // dist.get_world_size()
    for batch in models.batches(3, batch_size, SIZES):
        (model(batch).values().sum() * dist.get_world_size()).backward()
    with torch.no_grad():
        (batch,) = models.batches(1, batch_size, SIZES, seed=1)
        return model.eval()(batch).values().clone()


@pytest.mark.parametrize("per", ["token", "sample"])
def test_a_rank_without_a_shard_takes_part(tmp_path: Path, per: str):
    (alone,) = run_ranks(1, tmp_path / "alone", _inferred, per)
    # Of four shards, two ranks have two each and the third has none.
    parts = run_ranks(3, tmp_path / "parts", _inferred, per)
    torch.testing.assert_close(torch.cat(parts), alone, rtol=1e-5, atol=1e-5)


def _mixed() -> tuple[Tensor, Tensor]:
    """Tables per sample beside others: what the sample's features give, and what is dense."""
    sizes = SIZES | {"t_token": 300, "t_hash": 700}
    kinds = {
        "t_big": tc.MemRec(compression=5, per="sample"),
        "t_small": tc.MemRec(compression=5, per="sample"),
        "t_token": tc.MemRec(compression=5, num_shards=4),
        "t_hash": tc.Hash(compression=7),
    }
    constraints = {name: tc.ParameterConstraints(table=kind) for name, kind in kinds.items()}
    model = models.sharded(models.collection(sizes), constraints, EmbOptimType.EXACT_SGD)
    models.set_weights(model)
    (batch,) = models.batches(1, 12 // dist.get_world_size(), sizes)
    pooled = model(batch)
    assert torch.equal(pooled["f_big"], pooled["f_small"])  # one vector, which both give
    has_ids = batch["f_big"].lengths() + batch["f_small"].lengths() > 0
    assert torch.equal(pooled["f_big"].abs().sum(1) > 0, has_ids)
    return pooled["f_big"].detach(), torch.cat([pooled["f_token"], pooled["f_hash"]], 1).detach()


def test_samples_and_tokens_in_one_collection(tmp_path: Path):
    ((vectors, others),) = run_ranks(1, tmp_path / "alone", _mixed)
    assert others.any()
    parts = run_ranks(2, tmp_path / "parts", _mixed)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), vectors)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": PoolingType.MEAN}, "pooled by SUM, got pooling=PoolingType.MEAN"),
        ({"is_weighted": True}, "got weighted features; use MemRec"),
    ],
)
def test_vectors_of_samples_have_neither_means_nor_weights(options: dict[str, Any], message: str):
    kinds = {"t_small": tc.ParameterConstraints(table=tc.MemRec(compression=2, per="sample"))}
    sharders: list[Any] = [models.sharder()]
    with pytest.raises(ValueError, match=f"table 't_small': .*{message}"):
        models.planner(kinds, 1).plan(models.collection(SIZES, **options), sharders)
