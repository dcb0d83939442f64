"""Models, batches and what ranks do in the tests of sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models

SIZES = {"t_big": 5000, "t_small": 12}
#: kinds whose ids each have a vector
KINDS = [kind for kind in models.KINDS if kind != "mem_rec_sample"]


def collection(
    sizes: dict[str, int] = SIZES, *, device: str = "meta", need_indices: bool = False
) -> EmbeddingCollection:
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=name,
                num_embeddings=size,
                embedding_dim=8,
                feature_names=[name.replace("t_", "f_")],
            )
            for name, size in sizes.items()
        ],
        device=torch.device(device),
        need_indices=need_indices,
    )


def sharder(
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD, **options: Any
) -> tc.EmbeddingCollectionSharder:
    fused_params = {"optimizer": optimizer, "learning_rate": 0.1}
    return tc.EmbeddingCollectionSharder(fused_params=fused_params, **options)


def sharded(
    module: nn.Module,
    constraints: dict[str, Any] | None,
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
) -> DistributedModelParallel:
    sharders: list[Any] = [sharder(optimizer), models.sharder(optimizer)]
    plan = models.planner(constraints).collective_plan(module, sharders, dist.group.WORLD)
    return DistributedModelParallel(
        module, plan=plan, sharders=sharders, device=torch.device("cpu")
    )


def all_of(
    kind: str, optimizer: EmbOptimType, sharding_type: str = "row_wise", **options: Any
) -> DistributedModelParallel:
    """A collection whose tables are all of one kind."""
    constraint = tc.ParameterConstraints(table=models.KINDS[kind], sharding_types=[sharding_type])
    return sharded(collection(**options), dict.fromkeys(SIZES, constraint), optimizer)


def vectors(found: Any, batch: KeyedJaggedTensor) -> Tensor:
    """The vectors of all ids of a batch, in their order: sharded collections have another."""
    return torch.cat([found[key].values() for key in batch.keys()])  # noqa: SIM118  no mapping


def learn(kind: str, sharding_type: str) -> dict[str, Tensor]:
    """What a rank has after some steps whose gradients depend on the ids only."""
    model = all_of(kind, EmbOptimType.EXACT_SGD, sharding_type)
    models.set_weights(model)
    world_size = dist.get_world_size()
    strength = 0.02 if kind in ("mem_rec", "factors") else 0.25
    for batch in models.batches(30, 48 // world_size, SIZES):
        found = model(batch)
        # TorchRec divides the gradient of model-parallel tables by the number of ranks.
        pull = (1 + batch.values() % 5).float()[:, None] * strength * world_size
        (vectors(found, batch) * pull).sum().backward()
    return models.local_state(model)


def learn_all(kinds: list[str], sharding_type: str) -> dict[str, dict[str, Tensor]]:
    return {kind: learn(kind, sharding_type) for kind in kinds}


def no_samples(keys: list[str]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.empty(0, dtype=torch.int64),
        lengths=torch.empty(0, dtype=torch.int64),
        stride=0,
    )
