"""MEM-REC tables on gloo ranks; what they share with other kinds is in test_training.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks

SIZES = {"t_big": 5000, "t_small": 12}


def _inferred() -> Tensor:
    """What a model gives without gradients, after some steps; four shards, which is few."""
    few = tc.MemRec(compression=5, num_shards=4)
    kinds = {name: tc.ParameterConstraints(table=few) for name in SIZES}
    model = models.sharded(models.collection(SIZES), kinds, EmbOptimType.EXACT_SGD)
    models.set_weights(model)
    batch_size = 12 // dist.get_world_size()
    for batch in models.batches(3, batch_size, SIZES):
        (model(batch).values().sum() * dist.get_world_size()).backward()
    with torch.no_grad():
        (batch,) = models.batches(1, batch_size, SIZES, seed=1)
        return model.eval()(batch).values().clone()


def test_a_rank_without_a_shard_takes_part(tmp_path: Path):
    (alone,) = run_ranks(1, tmp_path / "alone", _inferred)
    # Of four shards, two ranks have two each and the third has none.
    parts = run_ranks(3, tmp_path / "parts", _inferred)
    torch.testing.assert_close(torch.cat(parts), alone)
