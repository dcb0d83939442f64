"""Models, batches and plans that the distributed tests share."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from torchrec_cafe.distributed.layout import parse_layout_key

#: rows of each table; the first two are compressed by Cafe, the third by Hash, the last is fused
SIZES = {"t_big": 5000, "t_small": 12, "t_hash": 700, "t_fused": 97}
CAFE = tc.Cafe(compression=5, num_shards=8, rebalance_interval=4, half_life=50, medium_fraction=0.0)
HASH = tc.Hash(compression=7)
#: every kind that a whole collection is tried with
KINDS = {
    "cafe": CAFE,
    "multi_level": dataclasses.replace(CAFE, medium_fraction=0.3),
    "frequency": dataclasses.replace(CAFE, importance="frequency", half_life=math.inf),
    "factors": dataclasses.replace(
        CAFE, medium_fraction=0.3, num_weight_hashes=3, weight_fraction=0.1
    ),
    "quotient_remainder": tc.QuotientRemainder(compression=5),
    "mem_rec": tc.MemRec(compression=5, num_hashes=2, num_weight_hashes=3, num_shards=8),
    "mem_rec_sample": tc.MemRec(compression=5, num_hashes=2, num_shards=8, per="sample"),
}


def constraints() -> dict[str, Any]:
    return {
        "t_big": tc.ParameterConstraints(table=CAFE),
        "t_small": tc.ParameterConstraints(table=CAFE),
        "t_hash": tc.ParameterConstraints(table=HASH),
        # TorchRec would replicate so small a table, and leave it to the dense optimizer.
        "t_fused": tc.ParameterConstraints(sharding_types=["table_wise"]),
    }


def collection(
    sizes: dict[str, int] = SIZES,
    *,
    pooling: PoolingType = PoolingType.SUM,
    is_weighted: bool = False,
    device: str = "meta",
) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=size,
                embedding_dim=8,
                feature_names=[name.replace("t_", "f_")],
                pooling=pooling,
            )
            for name, size in sizes.items()
        ],
        is_weighted=is_weighted,
        device=torch.device(device),
    )


def planner(
    table_constraints: dict[str, Any] | None,
    world_size: int | None = None,
    compute_device: str = "cpu",
) -> tc.EmbeddingShardingPlanner:
    ranks = world_size or dist.get_world_size()
    return tc.EmbeddingShardingPlanner(
        topology=Topology(
            world_size=ranks,
            local_world_size=None if world_size else int(os.environ["LOCAL_WORLD_SIZE"]),
            compute_device=compute_device,
        ),
        constraints=table_constraints,
        debug=False,
    )


def sharder(
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
) -> tc.EmbeddingBagCollectionSharder:
    return tc.EmbeddingBagCollectionSharder(
        fused_params={"optimizer": optimizer, "learning_rate": 0.1}
    )


def sharded(
    module: nn.Module,
    table_constraints: dict[str, Any] | None,
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
) -> DistributedModelParallel:
    sharders: list[Any] = [sharder(optimizer)]
    plan = planner(table_constraints).collective_plan(module, sharders, dist.group.WORLD)
    return DistributedModelParallel(
        module, plan=plan, sharders=sharders, device=torch.device("cpu")
    )


def part() -> int:
    """Which part of a batch this rank's is, in the order in which lookups see the samples.

    TorchRec's table-row-wise exchange puts the first ranks of all hosts before the second ones.
    """
    rank, local_size = dist.get_rank(), int(os.environ["LOCAL_WORLD_SIZE"])
    return rank % local_size * (dist.get_world_size() // local_size) + rank // local_size


def batches(
    count: int,
    batch_size: int,
    sizes: dict[str, int] = SIZES,
    *,
    weighted: bool = False,
    seed: int = 0,
) -> Iterator[KeyedJaggedTensor]:
    """This rank's part of batches of ``batch_size * world_size`` samples, the same for any world.

    Bags have 0 to 2 ids; popular ids are the small ones.
    """
    rank, world_size = part(), dist.get_world_size()
    total = batch_size * world_size
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        values, lengths, weights = [], [], []
        for size in sizes.values():
            bags = torch.randint(0, 3, (total,), generator=generator)
            ids = (torch.rand(int(bags.sum()), generator=generator) ** 4 * size).long()
            factors = torch.rand(len(ids), generator=generator)
            begin = int(bags[: rank * batch_size].sum())
            mine = bags[rank * batch_size : (rank + 1) * batch_size]
            end = begin + int(mine.sum())
            lengths.append(mine)
            values.append(ids[begin:end])
            weights.append(factors[begin:end])
        yield KeyedJaggedTensor(
            keys=[name.replace("t_", "f_") for name in sizes],
            values=torch.cat(values),
            lengths=torch.cat(lengths),
            weights=torch.cat(weights) if weighted else None,
            stride=batch_size,
        )


def pools(model: nn.Module) -> list[Any]:
    """The pools of a sharded model on this rank."""
    return [
        kernel.bags.pool
        for module in model.modules()
        if hasattr(module, "compressed_kernels")
        for kernel in module.compressed_kernels()
        if kernel.bags.pool is not None
    ]


def local_state(model: nn.Module) -> dict[str, Tensor]:
    """This rank's part of each state tensor; layouts, which are no rank's, are left out."""
    return {
        name: value.local_shards()[0].tensor.clone()
        if hasattr(value, "local_shards")
        else value.clone()
        for name, value in model.state_dict().items()
        if parse_layout_key(name) is None
        and (not hasattr(value, "local_shards") or value.local_shards())
    }


def pattern(rows: Tensor, dim: int, name: str) -> Tensor:
    """Weights of global rows of the tensor of that name."""
    return torch.sin(rows[:, None] * 1.7 + torch.arange(dim) * 0.3 + len(name))


def set_weights(model: nn.Module) -> None:
    """Weights that depend on the global row only, so that they are the same for any world."""
    for name, value in model.state_dict().items():
        if not name.endswith(".weight") or not hasattr(value, "local_shards"):
            continue
        for shard in value.local_shards():
            first = shard.metadata.shard_offsets[0]
            rows = torch.arange(first, first + shard.metadata.shard_sizes[0])
            weights = pattern(rows, shard.tensor.shape[1], name)
            shard.tensor.copy_(torch.zeros_like(weights) if "cafe_pool" in name else weights)
