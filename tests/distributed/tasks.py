"""What ranks do in several of the distributed tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models
from torchrec_cafe.ops import reference

SIZES = {"t_big": 5000, "t_small": 12}


def all_of(
    kind: str, optimizer: EmbOptimType, sharding_type: str = "row_wise", **options: Any
) -> DistributedModelParallel:
    """A collection whose tables are all of one kind."""
    constraint = tc.ParameterConstraints(table=models.KINDS[kind], sharding_types=[sharding_type])
    return models.sharded(
        models.collection(SIZES, **options), dict.fromkeys(SIZES, constraint), optimizer
    )


def save(folder: str, kind: str, sharding_type: str = "row_wise") -> dict[str, Tensor]:
    model = all_of(kind, EmbOptimType.EXACT_ROWWISE_ADAGRAD, sharding_type)
    for batch in models.batches(20, 24, SIZES):
        model(batch).values().pow(2).sum().backward()
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    return models.local_state(model)


def pulls(kind: str, weighted: bool) -> Iterator[tuple[KeyedJaggedTensor, Tensor]]:
    """Batches, with a gradient of what they look up that does not depend on the weights.

    So any world sees the same importance.
    """
    world_size, rank = dist.get_world_size(), models.part()
    batch_size = 48 // world_size
    # Rows and factors that pull at each other would grow without bound.
    strength = {"mem_rec_sample": 0.001, "mem_rec": 0.01}.get(kind, 0.25)
    batches = models.batches(30, batch_size, SIZES, weighted=weighted)
    for step, batch in enumerate(batches):
        samples = torch.arange(rank * batch_size, (rank + 1) * batch_size)
        pull = (1 + (samples * 7 + step) % 5).float()[:, None] * strength
        # TorchRec divides the gradient of model-parallel tables by the number of ranks.
        yield batch, pull * world_size


def learn(kind: str, weighted: bool, sharding_type: str = "row_wise") -> dict[str, Tensor]:
    """What a rank has after some steps."""
    model = all_of(kind, EmbOptimType.EXACT_SGD, sharding_type, is_weighted=weighted)
    models.set_weights(model)
    for batch, pull in pulls(kind, weighted):
        (model(batch).values() * pull).sum().backward()
    return models.local_state(model)


def pooled(sharding_type: str, weighted: bool) -> tuple[Tensor, Tensor]:
    """Mean pooling of a table in which every id has its row, sharded and not."""
    sizes = {"t_one": 50, "t_two": 31}
    whole = tc.ParameterConstraints(table=tc.Hash(compression=1), sharding_types=[sharding_type])
    keep_all = dict.fromkeys(sizes, whole)
    options: dict[str, Any] = {"pooling": PoolingType.MEAN, "is_weighted": weighted}
    if weighted:
        options["pooling"] = PoolingType.SUM
    model = models.sharded(models.collection(sizes, **options), keep_all)
    models.set_weights(model)
    plain = models.collection(sizes, device="cpu", **options)
    with torch.no_grad():
        for name, size in sizes.items():
            rows = torch.tensor([reference.mix_id(id_, size) for id_ in range(size)])
            weights = models.pattern(rows, 8, f"embedding_bags.{name}.weight")
            plain.embedding_bags[name].weight.copy_(weights)
    sharded, unsharded = [], []
    for batch in models.batches(3, 16, sizes, weighted=weighted):
        sharded.append(model(batch).values())
        unsharded.append(plain(batch).values())
    return torch.cat(sharded).detach(), torch.cat(unsharded).detach()


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """State tensors of all ranks; a rank that has no part of one may not know of it."""
    names = {name for part in parts for name in part}
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


# All kinds in the same ranks, one after the other: starting ranks takes longer than most of them.


def learn_all(kinds: list[str], sharding_type: str) -> dict[str, dict[str, Tensor]]:
    learned = {kind: learn(kind, False, sharding_type) for kind in kinds}
    return learned | {"cafe, weighted": learn("cafe", True, sharding_type)}
