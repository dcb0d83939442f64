"""A small model with a table of every kind, and what ranks do with its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import torchrec_cafe as tc
from tests.distributed import models

SIZES = {
    "t_cafe": 5000,
    "t_factors": 3000,
    "t_hash": 700,
    "t_quotient": 900,
    "t_token": 4000,
    "t_sample": 2000,
    "t_slots": 600,
    "t_own": 400,
}
TABLES: dict[str, Any] = {
    "t_cafe": models.KINDS["multi_level"],
    "t_factors": models.KINDS["factors"],
    "t_hash": models.HASH,
    "t_quotient": models.KINDS["quotient_remainder"],
    "t_token": models.KINDS["mem_rec"],
    "t_sample": models.KINDS["mem_rec_sample"],
    "t_slots": tc.Lookahead(cache_fraction=0.5, min_slots=1),
    "t_own": None,
}
BATCH_SIZE = 48


@dataclasses.dataclass
class Batch(Pipelineable):
    """Ids and labels of this rank's samples."""

    ids: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:  # noqa: FBT001, FBT002
        return Batch(self.ids.to(device, non_blocking), self.labels.to(device))

    def record_stream(self, stream: torch.Stream) -> None:
        """Nothing: the CPU has no streams."""


class Clicks(nn.Module):
    """Embeddings and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = models.collection(SIZES)
        self.over = nn.Linear(8 * len(SIZES), 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.sparse(batch.ids)  # whose order depends on the sharding
        columns = [pooled[name.replace("t_", "f_")] for name in SIZES]
        logits = self.over(torch.cat(columns, dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, logits.detach()


def build(
    sharding_type: str, tables: dict[str, Any] = TABLES
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The model and its optimizers, with weights that a seed decides."""
    torch.manual_seed(dist.get_rank())
    constraints = {
        name: tc.ParameterConstraints(table=kind, sharding_types=[sharding_type])
        for name, kind in tables.items()
    }
    model = models.sharded(Clicks(), constraints)
    with torch.no_grad():
        for parameter in model.module.over.parameters():  # DDP's
            parameter.fill_(0.1)
    dense = KeyedOptimizerWrapper(
        {k: p for k, p in model.named_parameters() if "embedding_bags" not in k},
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])


def batches(count: int, seed: int = 0, skip: int = 0) -> Iterator[Batch]:
    """This rank's part of batches that do not depend on the number of ranks."""
    part, size = models.part(), BATCH_SIZE // dist.get_world_size()
    for number, ids in enumerate(models.batches(count, size, SIZES, seed=seed)):
        if number < skip:
            continue
        samples = torch.arange(part * size, (part + 1) * size)
        yield Batch(ids, ((samples * 7 + number) % 3 == 0).float())


def train(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, data: Iterator[Batch]
) -> list[float]:
    """Losses over all ranks."""
    model.train()
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


@torch.no_grad()
def predictions(model: DistributedModelParallel) -> Tensor:
    """Of all samples of a fixed batch, in order; nothing is learned."""
    model.eval()
    (batch,) = batches(1, seed=9)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (models.part(), model(batch)[1]))
    return torch.cat([logits for _, logits in sorted(parts, key=lambda part: part[0])])


def whole_state(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Tensor]:
    """Every tensor of the state, its shards of all ranks put together."""
    mine: dict[str, list[tuple[int, Tensor]]] = {}
    state = optimizer.state_dict()["state"]
    entries = model.state_dict() | {
        f"{of} {name}": value for of, values in state.items() for name, value in values.items()
    }
    for name, value in entries.items():
        if not hasattr(value, "local_shards"):
            mine[name] = [(0, value.detach().clone())] if dist.get_rank() == 0 else []
            continue
        shards = value.local_shards()
        mine[name] = [(s.metadata.shard_offsets[0], s.tensor.clone()) for s in shards]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for part in parts:
        for name, shards in part.items():
            found.setdefault(name, []).extend(shards)
    return {
        name: torch.cat([tensor.reshape(-1) for _, tensor in sorted(shards, key=lambda s: s[0])])
        for name, shards in found.items()
    }


def outcome(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """Of a model that has seen 12 batches: state, predictions, losses on the next batches."""
    return {
        "state": whole_state(model, optimizer),
        "predictions": predictions(model),
        "losses": train(model, optimizer, batches(16, skip=12)),
    }


def load_and_go_on(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, folders: list[str]
) -> list[dict[str, Any]]:
    """What a model comes to from each of some checkpoints."""
    found = []
    for folder in folders:
        state = {"model": model, "optimizer": optimizer}
        assert tc.CheckpointManager(folder).load(state) == 12
        found.append(outcome(model, optimizer))
    return found


def save_then_load(
    folder: str, sharding_type: str, others: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a model comes to that is saved on the way, and from other checkpoints."""
    model, optimizer = build(sharding_type)
    train(model, optimizer, batches(12))
    tc.CheckpointManager(folder).save({"model": model, "optimizer": optimizer}, 12)
    return outcome(model, optimizer), load_and_go_on(model, optimizer, others)


def load(folders: list[str], sharding_type: str) -> list[dict[str, Any]]:
    """What a new model comes to from each of some checkpoints."""
    model, optimizer = build(sharding_type)
    optimizer.init_state()
    # From its second step on DDP fills its buckets in another order, and adds up in another.
    train(model, optimizer, batches(2, seed=5))
    return load_and_go_on(model, optimizer, folders)
