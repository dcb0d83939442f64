"""Estimated against measured time of a step's lookups, for every kind of table.

``python -m benchmarks.plan_times`` trains, on one rank and one thread, a collection of eight tables
of each kind in turns: forward, backward and row-wise Adagrad, the input of later batches handed to
look-ahead tables two steps before. The figure of a case is the median over the rounds; beside it
stands what ``tc.EmbeddingShardingPlanner`` estimates for the same tables. Estimates are for another
machine (TorchRec's default bandwidths), so that what counts is their order: Spearman's rank
correlation, over all cases and among the kinds of a case.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchmetrics.functional import spearman_corrcoef
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

import torchrec_cafe as tc
from benchmarks.common import Row, interleaved, print_rows, write_json, zipf_ids
from examples.dlrm.memory import keep_freed_pages
from examples.process import quieten

NUM_TABLES = 8
NUM_IDS = 500_000
NUM_BATCHES = 6
AHEAD = 2
FULL = "full"


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        dim: columns.
        pooling: ids of a bag.
        batch: samples.
    """

    dim: int
    pooling: int
    batch: int

    def __str__(self) -> str:
        ids = "1 id" if self.pooling == 1 else f"{self.pooling} ids"
        return f"dim {self.dim}, {ids} a bag, batch {self.batch}"


CASES = tuple(
    Case(dim, pooling, batch)
    for dim in (16, 64, 128)
    for pooling, batch in ((1, 2048), (1, 16384), (20, 2048))
)
QUICK = (Case(16, 1, 2048), Case(64, 20, 1024))


def kinds(folder: str) -> dict[str, Any]:
    """The kinds, by name; ``None``: plain tables."""
    return {
        FULL: None,
        "hash": tc.Hash(compression=100),
        "quotient-remainder": tc.QuotientRemainder(compression=100),
        "cafe, no factors": tc.Cafe(compression=100, num_weight_hashes=0),
        "cafe": tc.Cafe(compression=100),
        "mem-rec": tc.MemRec(compression=100),
        "mem-rec, 2 rows": tc.MemRec(compression=100, num_hashes=2),
        "look-ahead": tc.Lookahead(cache_fraction=0.1),
        "look-ahead, files": tc.Lookahead(cache_fraction=0.1, path=folder),
    }


class Tables:
    """A sharded collection, and what the planner has estimated for it.

    Args:
        case: what is trained.
        kind: how the tables are kept.
        data: batches.
        gradient: of what is looked up.

    Attributes:
        estimate: milliseconds of a step.
    """

    def __init__(
        self,
        case: Case,
        kind: Any,
        data: Sequence[KeyedJaggedTensor],
        gradient: torch.Tensor,
    ) -> None:
        """Plan and shard; see the class."""
        names = [f"t_{number}" for number in range(NUM_TABLES)]
        module = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=NUM_IDS,
                    embedding_dim=case.dim,
                    feature_names=[name.replace("t_", "f_")],
                )
                for name in names
            ],
            device=torch.device("meta"),
        )
        optimizer = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}
        sharders: list[Any] = [tc.EmbeddingBagCollectionSharder(fused_params=optimizer)]
        constraint = tc.ParameterConstraints(
            table=kind, sharding_types=["table_wise"], pooling_factors=[float(case.pooling)]
        )
        planner = tc.EmbeddingShardingPlanner(
            topology=Topology(world_size=1, compute_device="cpu"),
            batch_size=case.batch,
            constraints=dict.fromkeys(names, constraint),
            storage_reservation=FixedPercentageStorageReservation(0.1),
            stats=NoopEmbeddingStats(),
            debug=False,
        )
        self.estimate = planner.report_of(module, sharders).milliseconds
        model = DistributedModelParallel(
            module,
            plan=planner.collective_plan(module, sharders, dist.group.WORLD),
            sharders=sharders,
            device=torch.device("cpu"),
        )
        self._sharded: Any = model.module
        self._data, self._gradient, self._next = data, gradient, 0
        self._queue: deque[tuple[Any, Any]] = deque()

    def _enqueue(self) -> None:
        context = self._sharded.create_context()
        batch = self._data[self._next % len(self._data)]
        self._next += 1
        features = self._sharded.input_dist(context, batch).wait().wait()
        if hasattr(self._sharded, "look_ahead"):
            self._sharded.look_ahead(features)
        self._queue.append((context, features))

    def step(self) -> None:
        """Train on a batch."""
        while len(self._queue) <= AHEAD:
            self._enqueue()
        context, features = self._queue.popleft()
        pooled = self._sharded.compute_and_output_dist(context, features).wait()
        pooled.values().backward(self._gradient)


def batches(case: Case) -> list[KeyedJaggedTensor]:
    """Batches of Zipf-distributed ids."""
    size = case.batch * case.pooling
    streams = [
        zipf_ids(NUM_IDS, size * NUM_BATCHES, 1.05, seed=number) for number in range(NUM_TABLES)
    ]
    lengths = torch.full((NUM_TABLES * case.batch,), case.pooling)
    return [
        KeyedJaggedTensor(
            keys=[f"f_{number}" for number in range(NUM_TABLES)],
            values=torch.cat([stream[part * size : (part + 1) * size] for stream in streams]),
            lengths=lengths,
        )
        for part in range(NUM_BATCHES)
    ]


def measure(case: Case, rounds: int) -> dict[str, tuple[float, float]]:
    """Estimated and measured milliseconds of a case, by kind."""
    data = batches(case)
    gradient = torch.full((case.batch, NUM_TABLES * case.dim), 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        tables = {name: Tables(case, kind, data, gradient) for name, kind in kinds(folder).items()}
        jobs: dict[str, Callable[[], None]] = {name: of.step for name, of in tables.items()}
        interleaved(jobs, 3)
        seconds = interleaved(jobs, rounds)
    return {name: (of.estimate, seconds[name] * 1e3) for name, of in tables.items()}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, of estimates and measurements."""
    estimated, measured = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return spearman_corrcoef(estimated, measured).item()


def figures(results: dict[Case, dict[str, tuple[float, float]]]) -> list[Row]:
    """The report."""
    rows: list[Row] = []
    everything: list[tuple[float, float]] = []
    for case, of_kinds in results.items():
        full = of_kinds[FULL]
        for name, (estimate, measured) in of_kinds.items():
            rows.append(
                Row(f"{case}: {name}, measured", measured / full[1], "x full", baseline=1.0)
            )
            rows.append(Row(f"{case}: {name}, estimated", estimate / full[0], "x full"))
            everything.append((estimate, measured))
        rows.append(Row(f"{case}: full, a step", full[1], "ms"))
        of_case = rank_correlation(list(of_kinds.values()))
        rows.append(Row(f"{case}: Spearman among the kinds", of_case, ""))
    overall = rank_correlation(everything)
    rows.append(Row("Spearman over all cases and kinds", overall, "", target=0.9))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_times", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--rounds", type=int, default=0, help="turns of each kind (15)")
    parser.add_argument("--json", default="", metavar="PATH", help="write the figures there")
    args = parser.parse_args(arguments)
    quieten()
    keep_freed_pages()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rounds = args.rounds or (5 if args.quick else 15)
        cases = QUICK if args.quick else CASES
        results = {case: measure(case, rounds) for case in tqdm(cases, desc="cases")}
        rows = figures(results)
        print_rows(rows)
        write_json(args.json, "plan_times", rows)
    sys.stdout.flush()
    os._exit(0)  # gloo's teardown may abort


if __name__ == "__main__":
    main()
