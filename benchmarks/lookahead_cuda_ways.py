"""Ways to keep tables that a GPU trains; see :mod:`benchmarks.lookahead_cuda`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.distributed.types import CacheAlgorithm, CacheParams, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc

NUM_DENSE = 13
#: steps of a turn before the clock starts: pipelines fill
LEAD = 3
#: batches that are trained over and over
BATCHES = 96


@dataclass(frozen=True)
class Sizes:
    """What is trained.

    Attributes:
        tables: number of tables.
        rows: of each.
        dim: columns.
        batch: samples of a step.
        pooling: ids of a bag.
        over_arch: layers on top of the interactions.
    """

    tables: int = 8
    rows: int = 10_000_000
    dim: int = 128
    batch: int = 2048
    pooling: int = 20
    over_arch: tuple[int, ...] = (1024, 1024, 512, 256)

    @property
    def table_bytes(self) -> int:
        """Bytes of all rows."""
        return self.tables * self.rows * self.dim * 4

    @property
    def features(self) -> list[str]:
        """A feature of each table."""
        return [f"f_{number}" for number in range(self.tables)]


@dataclass(frozen=True)
class Way:
    """A way to keep the tables.

    Attributes:
        name: of it.
        kernel: TorchRec's compute kernel; empty: ours.
        fraction: rows that the GPU's memory holds, in (0, 1]; not for all, or none.
        algorithm: of FBGEMM's cache.
        prefetch: whether TorchRec's pipeline fills FBGEMM's cache ahead of time.
        depth: batches that ours looks ahead; 0: none.
    """

    name: str
    kernel: str
    fraction: float = 1.0
    algorithm: CacheAlgorithm = CacheAlgorithm.LRU
    prefetch: bool = False
    depth: int = 0

    @property
    def key(self) -> str:
        """Name and fraction."""
        return (
            self.name if self.kernel in ("fused", "fused_uvm") else f"{self.name} {self.fraction}"
        )

    def constraint(self) -> tc.ParameterConstraints:
        """What a plan has to say about each table."""
        types = ["table_wise"]
        if not self.kernel:
            kind = tc.Lookahead(cache_fraction=self.fraction)
            return tc.ParameterConstraints(table=kind, sharding_types=types)
        cache = None
        if self.kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
            cache = CacheParams(
                algorithm=self.algorithm,
                load_factor=self.fraction,
                prefetch_pipeline=self.prefetch,
            )
        return tc.ParameterConstraints(
            sharding_types=types, compute_kernels=[self.kernel], cache_params=cache
        )


ALL_IN_HBM = Way("hbm", "fused")


def ways(fractions: list[float], depths: list[int]) -> list[Way]:
    """What is compared with :data:`ALL_IN_HBM`, the first fraction first.

    Args:
        fractions: of rows that the GPU's memory holds.
        depths: of the look-ahead; all with the same tables.
    """
    cached = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
    found = []
    for fraction in fractions:
        found += [Way(f"lookahead, depth {depth}", "", fraction, depth=depth) for depth in depths]
        for name, algorithm in (("lru", CacheAlgorithm.LRU), ("lfu", CacheAlgorithm.LFU)):
            found += [
                Way(name, cached, fraction, algorithm),
                Way(f"{name}, prefetched", cached, fraction, algorithm, prefetch=True),
            ]
    return [*found, Way("uvm", EmbeddingComputeKernel.FUSED_UVM.value)]


def collection(sizes: Sizes) -> EmbeddingBagCollection:
    """The tables, without memory."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature}",
            feature_names=[feature],
            num_embeddings=sizes.rows,
            embedding_dim=sizes.dim,
        )
        for feature in sizes.features
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def fused_params(way: Way) -> dict[str, Any]:
    """What FBGEMM gets: host memory is pinned, not managed."""
    params: dict[str, Any] = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": 0.05,
    }
    if way.kernel.startswith("fused_uvm"):
        params["uvm_host_mapped"] = True
    return params


def plan(model: nn.Module, sizes: Sizes, way: Way, device: torch.device) -> ShardingPlan:
    """The plan of a model, all on one rank.

    Args:
        model: has the tables.
        sizes: of the tables.
        way: to keep them.
        device: where they are trained.
    """
    planner = tc.EmbeddingShardingPlanner(
        topology=Topology(
            world_size=1, compute_device=device.type, hbm_cap=1 << 42, ddr_cap=1 << 42
        ),
        constraints={f"t_{feature}": way.constraint() for feature in sizes.features},
        storage_reservation=FixedPercentageStorageReservation(0.1),
        stats=NoopEmbeddingStats(),
        debug=False,
    )
    return planner.plan(model, _sharders(way))


def _sharders(way: Way) -> list[Any]:
    return [tc.EmbeddingBagCollectionSharder(fused_params=fused_params(way))]


def batches(sizes: Sizes, exponent: float, count: int, device: torch.device) -> list[Batch]:
    """Batches of Zipf-distributed ids in pinned memory; popular ids are anywhere in the table.

    Args:
        sizes: of tables and batches.
        exponent: of the distribution.
        count: of batches.
        device: that makes the ids.
    """
    generator = torch.Generator(device).manual_seed(0)
    ranks = torch.arange(1, sizes.rows + 1, dtype=torch.float64, device=device)
    cumulated = (ranks**-exponent).cumsum(0)
    of_batch = sizes.batch * sizes.pooling
    ids = torch.empty(count, sizes.tables * of_batch, dtype=torch.int64)
    for table in range(sizes.tables):
        places = torch.randperm(sizes.rows, generator=generator, device=device)
        chance = torch.rand(
            count * of_batch, generator=generator, dtype=torch.float64, device=device
        )
        drawn = torch.searchsorted(cumulated, chance * cumulated[-1]).clamp_(max=sizes.rows - 1)
        ids[:, table * of_batch : (table + 1) * of_batch] = places[drawn].view(count, -1).cpu()
    lengths = torch.full((sizes.tables * sizes.batch,), sizes.pooling, dtype=torch.int32)
    made = []
    for part in ids:
        features = KeyedJaggedTensor(
            keys=sizes.features, values=part.clone(), lengths=lengths.clone(), stride=sizes.batch
        )
        batch = Batch(
            torch.randn(sizes.batch, NUM_DENSE), features, torch.rand(sizes.batch).round()
        )
        made.append(batch.pin_memory() if device.type == "cuda" else batch)
    return made


class Trained:
    """A DLRM in training.

    Args:
        sizes: of it.
        way: how its tables are kept.
        device: where it is trained.
    """

    def __init__(self, sizes: Sizes, way: Way, device: torch.device) -> None:
        """Build and shard; see the class."""
        torch.manual_seed(0)
        self._device = device
        model = DLRMTrain(
            DLRM(
                collection(sizes),
                dense_in_features=NUM_DENSE,
                dense_arch_layer_sizes=[512, 256, sizes.dim],
                over_arch_layer_sizes=[*sizes.over_arch, 1],
                dense_device=device,
            )
        )
        self.model = DistributedModelParallel(
            model,
            plan=plan(model, sizes, way, device),
            sharders=_sharders(way),
            device=device,
        )
        dense = {n: p for n, p in self.model.named_parameters() if "embedding_bag" not in n}
        self._optimizer = CombinedOptimizer(
            [
                KeyedOptimizerWrapper(dense, lambda given: torch.optim.SGD(given, lr=0.01)),
                self.model.fused_optimizer,
            ]
        )

    def turn(self, way: Way, data: Iterator[Batch], steps: int) -> float:
        """Seconds of a step, of so many.

        Args:
            way: says the pipeline; its tables must be kept as those of this.
            data: gives batches.
            steps: that are timed; those in which the pipeline fills and drains are not.
        """
        ahead = max(2, way.depth)
        step, close = self._stepper(way, itertools.islice(data, LEAD + steps + ahead))
        for _ in range(LEAD):
            step()
        start = self._now()
        for _ in range(steps):
            step()
        seconds = self._now() - start
        for _ in range(ahead):
            step()
        close()
        return seconds / steps

    def _stepper(
        self, way: Way, data: Iterator[Batch]
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        arguments: tuple[Any, ...] = (self.model, self._optimizer, self._device)
        if way.depth > 0:
            pipeline: Any = tc.LookaheadTrainPipeline(*arguments, depth=way.depth)
        elif way.prefetch:
            pipeline = PrefetchTrainPipelineSparseDist(*arguments)
        else:
            pipeline = TrainPipelineSparseDist(*arguments)
        return lambda: pipeline.progress(data), pipeline.detach

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def statistics(self) -> dict[str, float]:
        """What the scratchpads have done so far; empty without any."""
        total: dict[str, float] = {}
        for found in tc.lookahead_statistics(self.model).values():
            for name, value in found.scalars().items():
                total[name] = total.get(name, 0.0) + value
        return total


def start_group(device: torch.device) -> None:
    """A process group of this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
