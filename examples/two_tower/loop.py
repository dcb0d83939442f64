"""One training of the two towers, and how often they find what was bought later.

Shape legend: ``Q`` queries, ``P`` products, ``D`` columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer
from tqdm import tqdm

import torchrec_cafe as tc
from examples.process import device as this_device
from examples.two_tower.batches import BatchMaker
from examples.two_tower.config import TwoTowerConfig
from examples.two_tower.model import shard
from examples.two_tower.purchases import Purchases

#: steps before the clock starts: first calls allocate and warm up
WARM_UP_STEPS = 5
#: sizes of recommendations that the table has
AT = (10, 50, 100)
#: sizes of recommendations that the plot has
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_SCORED_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one training came to.

    Attributes:
        kind: of :data:`examples.two_tower.config.KINDS`, or ``popular``: no model at all.
        compression: dense bytes / resident bytes that was asked; 1 for full tables.
        seed: of the weights.
        recall: share of the later purchases whose product is among the first k, by k.
        embedding_bytes: weights, sketches and maps as allocated, over all ranks.
        purchases_per_second: of training, over all ranks, after a warm-up.
    """

    kind: str
    compression: float
    seed: int
    recall: dict[int, float]
    embedding_bytes: int
    purchases_per_second: float


def run(
    config: TwoTowerConfig, data: Purchases, kind: str, compression: float, seed: int
) -> Result:
    """Train on purchases in order of time, then look for those of later weeks.

    Args:
        config: options of the run.
        data: the purchases.
        kind: of :data:`examples.two_tower.config.KINDS`.
        compression: of the compressed kinds.
        seed: of the weights.
    """
    device = this_device()
    torch.manual_seed(seed)
    model, optimizer = shard(config, data.sizes, config.table(kind, compression), device)
    batches = BatchMaker(data, config.history)
    label = kind if kind == "full" else f"{kind} {compression:g}x"
    speed = _train(config, data, batches, model, optimizer, label)
    ranks = _evaluate(config, data, batches, model, label)
    resident = torch.tensor([tc.resident_bytes(model)], dtype=torch.int64, device=device)
    dist.all_reduce(resident)
    return Result(
        kind=kind,
        compression=1.0 if kind == "full" else compression,
        seed=seed,
        recall=recall(ranks),
        embedding_bytes=int(resident),
        purchases_per_second=speed,
    )


def popular(config: TwoTowerConfig, data: Purchases) -> Result:
    """What everyone gets if everyone is offered what is bought most.

    Args:
        config: options of the run.
        data: the purchases.
    """
    counts = BatchMaker(data, config.history).counts
    place = np.empty(len(counts), dtype=np.int64)
    place[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    ranks = torch.from_numpy(place[data.product[data.test(config.queries)]])
    return Result(
        kind="popular",
        compression=1.0,
        seed=0,
        recall=recall(ranks),
        embedding_bytes=0,
        purchases_per_second=0.0,
    )


def recall(ranks: Tensor) -> dict[int, float]:
    """Share of the queries whose product is among the first k, by k.

    Args:
        ranks: int64 ``[Q]``, how many products come before the one that was bought.
    """
    return {k: float((ranks < k).double().mean()) for k in CURVE}


def num_steps(config: TwoTowerConfig, num_purchases: int, world_size: int) -> int:
    """Steps of a training.

    Args:
        config: options of the run.
        num_purchases: to train on.
        world_size: number of ranks.

    Raises:
        ValueError: if there is not one batch.
    """
    steps = config.epochs * (num_purchases // (config.batch_size * world_size))
    if steps == 0:
        raise ValueError(
            f"--batch_size {config.batch_size} on {world_size} ranks is more than the "
            f"{num_purchases} training purchases; use a smaller one"
        )
    return min(steps, config.max_steps or steps)


def _train(
    config: TwoTowerConfig,
    data: Purchases,
    batches: BatchMaker,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    label: str,
) -> float:
    """Purchases per second, over all ranks."""
    places = data.train(None if config.full else config.sample)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    steps = num_steps(config, len(places), world_size)
    pipeline = TrainPipelineSparseDist(model, optimizer, model.device)
    source = batches.epochs(places, config.batch_size, steps, (rank, world_size))
    per_step = config.batch_size * world_size
    warm = min(WARM_UP_STEPS, steps - 1)
    start = time.perf_counter()
    model.train()
    with _bar(f"train {label}", steps * per_step, "purchases") as bar:
        for step in range(steps):
            if step == warm:
                start = time.perf_counter()
            loss, *_ = pipeline.progress(source)
            bar.update(per_step)
            if step % 20 == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
    speed = (steps - warm) * per_step / (time.perf_counter() - start)
    pipeline.detach()
    if rank == 0:
        for name, statistics in tc.pool_statistics(model).items():
            tqdm.write(f"{name}, rank 0: {statistics['hot_share']:.0%} of the lookups are hot")
    return speed


def _bar(label: str, total: int, unit: str) -> tqdm:
    """A progress bar on rank 0."""
    return tqdm(
        desc=label,
        total=total,
        unit=f" {unit}",
        unit_scale=True,
        mininterval=1.0,
        disable=dist.get_rank() != 0,
    )


@torch.no_grad()
def _evaluate(
    config: TwoTowerConfig,
    data: Purchases,
    batches: BatchMaker,
    model: DistributedModelParallel,
    label: str,
) -> Tensor:
    """How many products come before the one that was bought, int64 ``[Q]``, on every rank."""
    model.eval()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    products = np.arange(data.sizes["product"])
    candidates = torch.empty((len(products), config.embedding_dim), device=model.device)
    places = data.test(config.queries)
    targets = torch.from_numpy(data.product[places].astype(np.int64)).to(model.device)
    ranks = torch.empty(len(places), dtype=torch.int64, device=model.device)
    with _bar(f"test  {label}", len(products) + len(places), "vectors") as bar:
        for part, mine in _parts(len(products), 4 * config.batch_size, rank, world_size):
            _, (*_, vectors) = model(batches.of_products(products[mine]).to(model.device))
            candidates[part] = _gathered(vectors, len(part))
            bar.update(len(part))
        for part, mine in _parts(len(places), _SCORED_AT_ONCE, rank, world_size):
            _, (_, queries, _) = model(batches.of_purchases(places[mine]).to(model.device))
            scores = queries @ candidates.t()
            bought = scores.gather(1, targets[mine].unsqueeze(1))
            ranks[part] = _gathered(products_before(scores, bought), len(part))
            bar.update(len(part))
    return ranks.cpu()


def products_before(scores: Tensor, bought: Tensor) -> Tensor:
    """How many products come before the one that was bought, int64 ``[Q]``.

    Products that share all rows have the same score: half of them come before.

    Args:
        scores: ``[Q, P]``.
        bought: ``[Q, 1]``, the score of the product that was bought.
    """
    return (scores > bought).sum(1) + ((scores == bought).sum(1) - 1) // 2


def _parts(
    total: int, of_a_rank: int, rank: int, world_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """What all ranks do together and what this one does of it; all do as many, the last again."""
    for begin in range(0, total, of_a_rank * world_size):
        part = np.arange(begin, min(total, begin + of_a_rank * world_size))
        padded = np.arange(begin, begin + -(-len(part) // world_size) * world_size)
        yield part, np.minimum(padded, total - 1).reshape(world_size, -1)[rank]


def _gathered(mine: Tensor, size: int) -> Tensor:
    """What all ranks have, one after the other, without what was done again."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine.contiguous())
    return torch.cat(everyone)[:size]
