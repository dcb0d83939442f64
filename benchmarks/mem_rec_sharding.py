"""Time of a training step of MEM-REC tables on two ranks, by the way they are sharded.

``python -m benchmarks.mem_rec_sharding`` starts two gloo ranks of one thread each. In both, an
``EmbeddingBagCollection`` of 26 tables is sharded row-wise, table-wise (one pool on one rank, or
two pools of half the rows on a rank each) and data-parallel. They take turns: forward, backward
and, of the replicas, the step of the dense optimizer, all with row-wise Adagrad or, where it is
dense, Adagrad. A turn is over when both ranks are done; the figure of a case is the median over the
rounds of its time over that of row-wise tables.

Ranks on one machine exchange data through its memory: a network makes communication dearer. The
bytes that each way sends are beside the times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

import torchrec_cafe as tc
from benchmarks.common import Row, print_rows, write_json, zipf_ids
from examples.dlrm.memory import keep_freed_pages
from examples.process import quieten

WORLD_SIZE = 2
NUM_TABLES = 26
NUM_IDS = 1_000_000
BATCH = 2048
BASELINE = "row-wise"
WAYS = (BASELINE, "table-wise", "table-wise, two pools", "data-parallel")


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        dim: columns.
        pooling: ids of a bag.
        token_rows: of the token table, over all pools.
    """

    dim: int
    pooling: int
    token_rows: int

    def __str__(self) -> str:
        ids = "1 id" if self.pooling == 1 else f"{self.pooling} ids"
        return f"dim {self.dim}, {ids} a bag, {self.token_rows:,} token rows"


CASES = tuple(
    Case(dim, pooling, token_rows)
    for dim in (16, 128)
    for pooling in (1, 20)
    for token_rows in (20_000, 200_000)
)


def constraints(way: str, token_rows: int) -> dict[str, tc.ParameterConstraints]:
    """How the tables are kept and sharded, by table."""
    pools = 2 if way.endswith("two pools") else 1
    sharding_type = way.partition(",")[0].replace("-", "_")
    found = {}
    for number in range(NUM_TABLES):
        pool = number % pools
        # Kinds that differ have pools of their own.
        kind = tc.MemRec(num_token_rows=token_rows // pools + 64 * pool)
        found[f"t_{number}"] = tc.ParameterConstraints(table=kind, sharding_types=[sharding_type])
    return found


class Tables:
    """A sharded collection and what trains it.

    Args:
        case: what is trained.
        way: of :data:`WAYS`.
    """

    def __init__(self, case: Case, way: str) -> None:
        """Plan and shard; see the class."""
        module = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t_{number}",
                    num_embeddings=NUM_IDS,
                    embedding_dim=case.dim,
                    feature_names=[f"f_{number}"],
                )
                for number in range(NUM_TABLES)
            ],
            device=torch.device("meta"),
        )
        optimizer = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}
        sharders: list[Any] = [tc.EmbeddingBagCollectionSharder(fused_params=optimizer)]
        planner = tc.EmbeddingShardingPlanner(
            topology=Topology(world_size=WORLD_SIZE, compute_device="cpu"),
            constraints=constraints(way, case.token_rows),
            storage_reservation=FixedPercentageStorageReservation(0.1),
            stats=NoopEmbeddingStats(),
            debug=False,
        )
        self._model = DistributedModelParallel(
            module,
            plan=planner.collective_plan(module, sharders, dist.group.WORLD),
            sharders=sharders,
            device=torch.device("cpu"),
        )
        dense = dict(in_backward_optimizer_filter(self._model.named_parameters()))
        self._dense = torch.optim.Adagrad(dense.values(), lr=0.01) if dense else None

    def step(self, batch: KeyedJaggedTensor, gradient: Tensor) -> float:
        """Seconds of a step, until all ranks are done."""
        dist.barrier()
        start = time.perf_counter()
        if self._dense is not None:
            self._dense.zero_grad()
        self._model(batch).values().backward(gradient)
        if self._dense is not None:
            self._dense.step()
        dist.barrier()
        return time.perf_counter() - start


def draw(case: Case, seed: int) -> KeyedJaggedTensor:
    """A batch of this rank."""
    ids = zipf_ids(NUM_IDS, BATCH * case.pooling * NUM_TABLES, 1.05, seed)
    return KeyedJaggedTensor(
        keys=[f"f_{number}" for number in range(NUM_TABLES)],
        values=ids,
        lengths=torch.full((NUM_TABLES * BATCH,), case.pooling),
        stride=BATCH,
    )


def sent_bytes(case: Case, way: str) -> float:
    """Bytes that leave the busiest rank in a step, ids and FP32 vectors, without headers.

    Row-wise: ids of the other rank's rows, parts of the other's sums, and back the gradients of
    all. Table-wise: as much of one rank's features. Data-parallel: the gradients of both tables,
    once around the ring.
    """
    ids = BATCH * case.pooling * NUM_TABLES * 8
    vectors = BATCH * NUM_TABLES * case.dim * 4
    others = (WORLD_SIZE - 1) / WORLD_SIZE
    if way == "data-parallel":
        return 2 * others * case.token_rows * (case.dim + 1) * 4
    if way == BASELINE:
        return ids * others + 2 * (WORLD_SIZE - 1) * vectors
    return (
        max(ids + vectors, vectors * (WORLD_SIZE - 1)) if way == "table-wise" else ids / 2 + vectors
    )


def measure(cases: Sequence[Case], rounds: int) -> list[Row]:
    """The figures of all cases, on every rank; the clock is this rank's."""
    found: list[Row] = []
    for case in tqdm(cases, desc="cases", disable=dist.get_rank() != 0):
        batches = [draw(case, 10 * number + dist.get_rank()) for number in range(3)]
        gradient = torch.randn(BATCH, NUM_TABLES * case.dim) / BATCH
        tables = {way: Tables(case, way) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(-2, rounds):
            for way in WAYS:
                spent = tables[way].step(batches[number % len(batches)], gradient)
                if number >= 0:  # after a warm-up
                    seconds[way].append(spent)
        base = 1000 * statistics.median(seconds[BASELINE])
        for way in WAYS:
            ratios = [a / b for a, b in zip(seconds[way], seconds[BASELINE], strict=True)]
            spent = 1000 * statistics.median(seconds[way])
            found.append(Row(f"{case}/{way}", spent, "ms", base))
            found.append(Row(f"{case}/{way} over row-wise", statistics.median(ratios), "x", 1.0))
            found.append(Row(f"{case}/{way} sends", sent_bytes(case, way) / 2**20, "MiB"))
    return found


def _rank(rank: int, folder: str, run: Callable[[], list[Row]], json: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(WORLD_SIZE), "LOCAL_WORLD_SIZE": str(WORLD_SIZE)}
    quieten()
    keep_freed_pages()
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    rows = run()
    if rank == 0:
        print_rows(rows)
        write_json(json, "mem_rec_sharding", rows)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's teardown may abort after all is done


class _Measure:
    """What each rank runs; a class, so that it can be sent to another process."""

    def __init__(self, cases: Sequence[Case], rounds: int) -> None:
        self._cases, self._rounds = cases, rounds

    def __call__(self) -> list[Row]:
        return measure(self._cases, self._rounds)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=15, help="in which all take turns (default: 15)")
    add("--quick", action="store_true", help="one case, few rounds: judges nothing")
    add("--json", default="", help="where to write the figures")
    options = parser.parse_args()
    cases, rounds = (CASES[:1], 3) if options.quick else (CASES, options.rounds)
    with tempfile.TemporaryDirectory(prefix="cafe-benchmark-") as folder:
        mp.spawn(_rank, (folder, _Measure(cases, rounds), options.json), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
