"""One way to keep the tables, in a process of its own; see :mod:`benchmarks.lookahead`."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import torchrec_cafe as tc
from benchmarks.common import zipf_ids
from benchmarks.page_cache import MemoryGroup
from examples.dlrm.memory import keep_freed_pages
from examples.process import quieten
from torchrec_cafe.distributed import ShardedCompressedEmbeddingBagCollection

NUM_DENSE = 13
OPTIMIZER: dict[str, Any] = {
    "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "learning_rate": 0.05,
}
#: steps of a turn before the clock starts: pipelines fill
LEAD = 2


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        tables: number of tables.
        rows: of each.
        dim: columns.
        batch: samples of a step.
        pooling: ids of a bag.
        exponent: of the Zipf distribution of the ids.
        cache_fraction: slots over rows.
        over_arch: layers on top of the interactions.
    """

    tables: int
    rows: int
    dim: int
    batch: int
    pooling: int
    exponent: float
    cache_fraction: float
    over_arch: tuple[int, ...]

    @property
    def table_bytes(self) -> int:
        """Bytes of all rows."""
        return self.tables * self.rows * self.dim * 4

    @property
    def scratchpad_bytes(self) -> int:
        """Bytes of the slots."""
        return int(self.table_bytes * self.cache_fraction)

    @property
    def features(self) -> list[str]:
        """A feature of each table."""
        return [f"f_{number}" for number in range(self.tables)]


class MappedCollection(EmbeddingBagCollection):
    """Tables whose rows are a memory-mapped file, and nothing else: what the kernel makes of it.

    Args:
        tables: as TorchRec's.
        path: of the file.
    """

    def __init__(self, tables: list[EmbeddingBagConfig], path: Path) -> None:
        """Map the file; see the class."""
        super().__init__(tables=tables, device=torch.device("meta"))
        rows, dim = tables[0].num_embeddings, tables[0].embedding_dim
        size = len(tables) * rows * dim
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)
        weights = torch.from_file(str(path), shared=True, size=size)
        self.tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * len(tables),
            device=torch.device("cpu"),
            **OPTIMIZER,
        )
        for part in weights.split(1 << 26):
            part.uniform_(-0.01, 0.01)
        self.tbe.weights_host = nn.Parameter(weights)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool."""
        pooled = self.tbe(features.values(), features.offsets().long())
        dims = [config.embedding_dim for config in self.embedding_bag_configs()]
        return KeyedTensor(features.keys(), dims, pooled)


def batches(case: Case, count: int) -> list[Batch]:
    """So many batches, none of which comes twice."""
    random = np.random.default_rng(0)
    size = case.batch * case.pooling
    ids = torch.stack(
        [zipf_ids(case.rows, count * size, case.exponent, seed) for seed in range(case.tables)]
    )
    lengths = torch.full((case.tables * case.batch,), case.pooling, dtype=torch.int32)
    return [
        Batch(
            dense_features=torch.from_numpy(
                random.standard_normal((case.batch, NUM_DENSE), np.float32)
            ),
            sparse_features=KeyedJaggedTensor(
                keys=case.features, values=part.reshape(-1), lengths=lengths, stride=case.batch
            ),
            labels=torch.from_numpy((random.random(case.batch) < 0.3).astype(np.float32)),
        )
        for part in ids.split(size, dim=1)
    ]


class Trained:
    """A model in training.

    Args:
        case: its sizes.
        way: ``"dram"``, ``"mapped"``, ``"file"`` or ``"memory"``, of which the last two look ahead.
        folder: where files lie.
    """

    def __init__(self, case: Case, way: str, folder: Path) -> None:
        """Build and shard; see the class."""
        torch.manual_seed(0)
        self._case, self._way = case, way
        tables = [
            EmbeddingBagConfig(
                name=f"t_{feature}",
                feature_names=[feature],
                num_embeddings=case.rows,
                embedding_dim=case.dim,
            )
            for feature in case.features
        ]
        if way == "mapped":
            collection = MappedCollection(tables, folder / "mapped")
        else:
            collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        model = DLRMTrain(
            DLRM(
                collection,
                dense_in_features=NUM_DENSE,
                dense_arch_layer_sizes=[512, 256, case.dim],
                over_arch_layer_sizes=[*case.over_arch, 1],
            )
        )
        path = str(folder / "file") if way == "file" else None
        kind = tc.Lookahead(cache_fraction=case.cache_fraction, path=path)
        looks_ahead = way in ("file", "memory")
        self.model = model if way == "mapped" else self._shard(model, kind if looks_ahead else None)
        dense = {n: p for n, p in self.model.named_parameters() if "embedding_bag" not in n}
        optimizers: list[Any] = [
            KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.SGD(parameters, lr=0.01))
        ]
        if isinstance(self.model, DistributedModelParallel):
            optimizers.append(self.model.fused_optimizer)
        self._optimizer = CombinedOptimizer(optimizers)

    def _shard(self, model: nn.Module, kind: tc.Lookahead | None) -> DistributedModelParallel:
        constraint = tc.ParameterConstraints(table=kind, sharding_types=["table_wise"])
        planner = tc.EmbeddingShardingPlanner(
            topology=Topology(world_size=1, compute_device="cpu", ddr_cap=1 << 40),
            constraints={f"t_{feature}": constraint for feature in self._case.features},
            storage_reservation=FixedPercentageStorageReservation(0.1),
            stats=NoopEmbeddingStats(),
            debug=False,
        )
        sharders: list[Any] = [tc.EmbeddingBagCollectionSharder(fused_params=OPTIMIZER)]
        plan = planner.collective_plan(model, sharders, dist.group.WORLD)
        device = torch.device("cpu")
        return DistributedModelParallel(model, plan=plan, sharders=sharders, device=device)

    def turn(self, data: Iterator[Batch], depth: int, steps: int) -> list[float]:
        """Seconds of each of so many steps; 0: no look-ahead.

        Args:
            data: gives batches.
            depth: of the look-ahead.
            steps: that are timed; those in which the pipeline fills and drains are not.
        """
        count = LEAD + steps + depth
        step, close = self._stepper(itertools.islice(data, count), depth)
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        close()
        return seconds[LEAD : LEAD + steps]

    def _stepper(
        self, data: Iterator[Batch], depth: int
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        if self._way == "mapped":
            return lambda: self._plain_step(next(data)), lambda: None
        device = torch.device("cpu")
        if depth > 0:
            pipeline = tc.LookaheadTrainPipeline(self.model, self._optimizer, device, depth=depth)
        else:
            pipeline = TrainPipelineSparseDist(self.model, self._optimizer, device)
        return lambda: pipeline.progress(data), pipeline.detach

    def _plain_step(self, batch: Batch) -> None:
        self._optimizer.zero_grad()
        loss, _ = self.model(batch)
        loss.backward()
        self._optimizer.step()

    def fill(self, data: Iterator[Batch]) -> None:
        """Train the tables alone until the scratchpad is full, as in the middle of a training."""
        slots = int(self._case.tables * self._case.rows * self._case.cache_fraction)
        for module in self.model.modules():
            if isinstance(module, ShardedCompressedEmbeddingBagCollection):
                while self.statistics()["fills"] < 1.1 * slots:
                    pooled = module(next(data).sparse_features).values()
                    (1e-3 * pooled).sum().backward()

    def statistics(self) -> dict[str, float]:
        """What the scratchpad has done so far; empty without one."""
        return {
            name: value
            for statistics in tc.lookahead_statistics(self.model).values()
            for name, value in vars(statistics).items()
        }


def serve(
    connection: Connection, case: Case, way: str, folder: Path, count: int, page_cache: int
) -> None:
    """Train when told to, and say how long it took.

    Args:
        connection: receives ``(depth, steps)`` or ``None``, sends seconds and statistics.
        case: what is trained.
        way: of :class:`Trained`.
        folder: where files lie; made, and removed at the end.
        count: batches to have ready.
        page_cache: bytes of it that the process may have; 0: as much as there is.
    """
    quieten()
    group = MemoryGroup() if page_cache else None
    folder.mkdir(parents=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        data = itertools.cycle(batches(case, count))
        trained = Trained(case, way, folder)
        keep_freed_pages()
        trained.turn(data, 0, 1)
        trained.fill(data)
        limit = group.limit(page_cache) if group else 0
        connection.send(limit)
        while (command := connection.recv()) is not None:
            depth, steps = command
            before = trained.statistics()
            seconds = trained.turn(data, depth, steps)
            after = trained.statistics()
            connection.send((seconds, {name: after[name] - before[name] for name in after}))
    finally:
        shutil.rmtree(folder)
        if group:
            group.leave()
