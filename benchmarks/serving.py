"""What it costs to follow, export, serve and convert compressed tables.

``python -m benchmarks.serving`` has eight tables of a million ids (dim 16; ids Zipf(1.05), one a
bag) in one process, on one thread. Steps with and without a tracker take turns, as do lookups of
the model in training and of the served one; exports and the conversion are timed once, progress
bars and files included. Predictions are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from benchmarks.common import Row, print_rows, write_json, zipf_ids
from examples.dlrm.memory import keep_freed_pages
from examples.process import quieten

NUM_TABLES, NUM_IDS, DIM, BATCH = 8, 1_000_000, 16, 2048
DENSE_MB = NUM_TABLES * NUM_IDS * DIM * 4 / 1e6
TABLES = tuple(f"t{number}" for number in range(NUM_TABLES))


def _collection() -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            name=name, feature_names=[f"f_{name}"], num_embeddings=NUM_IDS, embedding_dim=DIM
        )
        for name in TABLES
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device("meta"))


def _model(compression: float) -> Any:
    torch.manual_seed(0)
    module = _collection()
    constraint = tc.ParameterConstraints(table=tc.Cafe(compression=compression))
    planner = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        constraints=dict.fromkeys(TABLES, constraint),
        debug=False,
    )
    sharders: list[Any] = [
        tc.EmbeddingBagCollectionSharder(
            fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}
        )
    ]
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    return DistributedModelParallel(
        module, plan=plan, sharders=sharders, device=torch.device("cpu")
    )


def _batches(count: int) -> list[KeyedJaggedTensor]:
    ids = torch.stack([zipf_ids(NUM_IDS, count * BATCH, 1.05, n) for n in range(NUM_TABLES)])
    return [
        KeyedJaggedTensor(
            keys=[f"f_{name}" for name in TABLES],
            values=part.reshape(-1),
            lengths=torch.ones(NUM_TABLES * BATCH, dtype=torch.int64),
        )
        for part in ids.split(BATCH, dim=1)
    ]


def _ratios(jobs: tuple[Callable[[], None], Callable[[], None]], rounds: int) -> list[float]:
    """Time of the second over that of the first, by round; they take turns."""
    ratios = []
    for number in range(rounds):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            jobs[which]()
            seconds[which] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[0])
    return ratios


@contextmanager
def _seconds(into: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into[name] = time.perf_counter() - start


def _time_checkpoints(
    into: Any, model: Any, batches: list[KeyedJaggedTensor], spent: dict[str, float]
) -> None:
    """Seconds of an export as an uncompressed checkpoint, and of the conversion of that."""
    with tempfile.TemporaryDirectory() as folder:
        with _seconds(spent, "dense export"):
            state = {"model": tc.dense_state_dict(model)}
            dcp.save(state, checkpoint_id=folder, planner=tc.DenseSavePlanner())
        counts = {
            name: tc.IdCounts.of(torch.cat([batch[f"f_{name}"].values() for batch in batches]))
            for name in TABLES
        }
        with _seconds(spent, "conversion"):
            tc.convert(into, folder, counts=counts)


def _measure(compression: float, batches: list[KeyedJaggedTensor], rounds: int) -> list[Row]:
    plain, followed = _model(compression), _model(compression)
    tracker = tc.DeltaTracker(followed)
    grad = torch.randn(BATCH, NUM_TABLES * DIM, generator=torch.Generator().manual_seed(0)) / BATCH

    def train(model: Any, few: list[KeyedJaggedTensor]) -> None:
        for batch in few:
            model(batch).values().backward(grad)

    def look_up(model: Any) -> None:
        with torch.no_grad():
            for batch in batches[:4]:
                model(batch).values()

    for model in (plain, followed):
        train(model, batches)
    few = batches[:4]
    tracked = _ratios((lambda: train(plain, few), lambda: train(followed, few)), rounds)
    spent: dict[str, float] = {}
    with _seconds(spent, "full export"):
        served: Any = tracker.to_inference(_collection())
    behind = copy.deepcopy(served)
    train(followed, few)
    with _seconds(spent, "delta of 4 steps"):
        delta = tracker.delta(since=tracker.version)
    with _seconds(spent, "delta applied"):
        tc.apply_delta(behind, delta)  # pyright: ignore[reportArgumentType]
    served = tc.to_inference(followed, _collection())
    followed.eval()
    mine, theirs = (model(batches[0]).values() for model in (served, behind))
    assert torch.equal(mine, theirs)
    exact = followed(batches[0]).values()
    assert (mine - exact).abs().max() < 0.02 * exact.abs().max()
    served_over = _ratios((lambda: look_up(followed), lambda: look_up(served)), rounds)
    _time_checkpoints(plain, followed, batches, spent)
    case = f"{compression:g}x"
    rows = [Row(f"{case}/{name}", seconds, "s") for name, seconds in spent.items()]
    for name in ("dense export", "conversion"):
        rows.append(Row(f"{case}/{name}, dense bytes", DENSE_MB / spent[name], "MB/s"))
    for name, ratios in (("step with tracker", tracked), ("served lookup", served_over)):
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(Row(f"{case}/{name} over without", median, "x", 1.0))
        rows.append(Row(f"{case}/{name}, lower quartile", lower, "x"))
        rows.append(Row(f"{case}/{name}, upper quartile", upper, "x"))
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one compression, fewer rounds")
    parser.add_argument("--json", default="", help="where to write the figures")
    options = parser.parse_args()
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    quieten()
    keep_freed_pages()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    batches = _batches(20)
    rows: list[Row] = []
    for compression in (100.0,) if options.quick else (10.0, 100.0):
        rows += _measure(compression, batches, 15 if options.quick else 40)
    print_rows(rows)
    write_json(options.json, "serving", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
