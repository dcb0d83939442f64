"""Time of a training step with CAFE tables over that of one with hashed tables of the same bytes.

``python -m benchmarks.train_step`` trains TorchRec's DLRM, with a table of each of Criteo Kaggle's
26 cardinalities, in one process. The kinds take turns of four steps, in alternating order; the
figure of a case is the median over the rounds of cafe / hash, and has to be at most 1.05. Ids are
Zipf(1.05), drawn before the clock starts.

The dense layers are the example's (bottom 64, dim; over 256, 128, 1), smaller than in practice, so
that the tables take more of a step. ``--layers reference`` takes those of DLRM's own script for
Criteo Kaggle (bottom 512, 256, 64, dim; over 512, 256, 1).

malloc keeps what is freed, as allocators in production do: glibc's gives large blocks back, and a
step on a CPU then spends up to half of its time, and never the same, on new pages. The ratio of CPU
time is reported beside that of time: on a busy machine it is the steadier of the two.

Where the difference goes is shown for some cases, see :mod:`benchmarks.train_step_parts`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
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
from tqdm import tqdm

import torchrec_cafe as tc
from benchmarks.common import Row, print_rows, write_json
from benchmarks.train_step_data import (
    BATCHES,
    CASES,
    FEATURES,
    LAYERS,
    NUM_DENSE,
    PARTS_CASES,
    QUICK_CASES,
    Case,
    Layers,
    draw_ids,
    make_batches,
    parse_cases,
)
from benchmarks.train_step_parts import measure_parts, parts_rows, parts_table
from examples.dlrm.data.generator import NUM_EMBEDDINGS
from examples.dlrm.memory import keep_freed_pages
from examples.process import quieten

#: a kind of table; none: TorchRec's own
Table = tc.Hash | tc.Cafe | tc.MemRec | None

COMPRESSION = 100
BASELINE = "hash"
FULL = "full"
#: how tables are kept; every kind is compared with the baseline
KINDS: dict[str, Table] = {
    BASELINE: tc.Hash(compression=COMPRESSION),
    "cafe": tc.Cafe(compression=COMPRESSION),
    "cafe_without_factors": tc.Cafe(compression=COMPRESSION, num_weight_hashes=0),
    "cafe_single_level": tc.Cafe(compression=COMPRESSION, num_weight_hashes=0, medium_fraction=0.0),
    "mem_rec": tc.MemRec(compression=COMPRESSION),
    FULL: None,
}
DEFAULT_KINDS = tuple(KINDS)[:4]
#: most that a step may take, in steps of the baseline
TARGET = 1.05
# Cafe re-assigns hot rows in every fourth step; a turn has one such step, whichever it is.
STEPS_PER_TURN = 4


class Trained:
    """A model in training.

    Args:
        case: its sizes.
        kind: how its tables are kept.
        batches: what it is trained on, over and over.
        device: CPU or the GPU.
        layers: the dense ones.
    """

    def __init__(
        self,
        case: Case,
        kind: Table,
        batches: Sequence[Batch],
        device: torch.device,
        layers: Layers = LAYERS["small"],
    ) -> None:
        """Plan, shard, and give the dense layers their optimizer; see the class."""
        torch.manual_seed(0)
        self._device = device
        self.model = _shard(_dlrm(case.dim, layers), kind, case.batch, device)
        dense = KeyedOptimizerWrapper(
            {n: p for n, p in self.model.named_parameters() if "embedding_bags" not in n},
            lambda parameters: torch.optim.Adam(parameters, lr=0.001),
        )
        optimizer = CombinedOptimizer([self.model.fused_optimizer, dense])
        self._pipeline = TrainPipelineSparseDist(self.model, optimizer, device)
        self._batches = itertools.cycle(batches)

    def step(self) -> Tensor:
        """One step; its loss."""
        loss, *_ = self._pipeline.progress(self._batches)
        return loss

    def turn(self) -> tuple[float, float]:
        """Seconds of a step, and of CPU time in it; mean of a turn."""
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(STEPS_PER_TURN):
            self.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - start, time.process_time() - cpu_start
        return spent[0] / STEPS_PER_TURN, spent[1] / STEPS_PER_TURN


def _dlrm(dim: int, layers: Layers) -> DLRMTrain:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature}", feature_names=[feature], num_embeddings=size, embedding_dim=dim
        )
        for feature, size in zip(FEATURES, NUM_EMBEDDINGS, strict=True)
    ]
    return DLRMTrain(
        DLRM(
            EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
            dense_in_features=NUM_DENSE,
            dense_arch_layer_sizes=[*layers.bottom, dim],
            over_arch_layer_sizes=list(layers.over),
        )
    )


def _shard(
    model: DLRMTrain, kind: Table, batch: int, device: torch.device
) -> DistributedModelParallel:
    planner = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device=device.type, ddr_cap=64 * 2**30),
        constraints={
            f"t_{feature}": tc.ParameterConstraints(
                table=kind, sharding_types=None if kind else ["table_wise"]
            )
            for feature in FEATURES
        },
        batch_size=batch,
        storage_reservation=FixedPercentageStorageReservation(0.1),
        stats=NoopEmbeddingStats(),
        debug=False,
    )
    sharders: list[Any] = [
        tc.EmbeddingBagCollectionSharder(
            fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}
        )
    ]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    return DistributedModelParallel(model, plan=plan, sharders=sharders, device=device)


def _warm_up(models: Mapping[str, Trained], steps: int) -> dict[str, list[float]]:
    """Losses of each kind while its sketch fills and its rows are handed out."""
    losses: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(steps), desc="warm-up", unit="step", leave=False):
        for name, model in models.items():
            losses[name].append(float(model.step()))
    return losses


def check(case: Case, models: Mapping[str, Trained], losses: Mapping[str, list[float]]) -> None:
    """What is about to be measured trains, has the bytes it promises, and has warmed up.

    Args:
        case: what is trained.
        models: by kind.
        losses: of the warm-up, by kind.
    """
    resident = {n: tc.resident_bytes(model.model) for n, model in models.items() if n != FULL}
    budget = sum(NUM_EMBEDDINGS) * case.dim * 4 / COMPRESSION
    for name, model in models.items():
        of_kind = losses[name]
        assert all(map(math.isfinite, of_kind)), f"{case}: {name} has a loss that is not finite"
        # The dense layers start equal; the rows are random, and large in small tables.
        apart = abs(of_kind[0] / losses[BASELINE][0] - 1)
        assert apart < 0.2, f"{case}: {name} starts {apart:.0%} off the loss of {BASELINE}"
        first, last = (statistics.fmean(part) for part in (of_kind[:5], of_kind[-5:]))
        assert last < first, f"{case}: the loss of {name} has gone from {first} to {last}"
        if name == FULL:
            continue
        size = resident[name]
        assert size <= budget, f"{case}: {name} keeps {size} bytes, more than {budget:.0f}"
        least = 0.98 * max(resident.values())
        assert size >= least, f"{case}: not the same bytes: {resident}"
        for pool, figures in tc.pool_statistics(model.model).items():
            share = figures["hot_occupancy"]
            assert share > 0.9, f"{case}: {name}: {pool} has only {share:.0%} of its rows in use"


def _take_turns(models: Mapping[str, Trained], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of a step of each kind, by round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in tqdm(range(rounds), desc="rounds", leave=False):
        for name in list(models)[:: 1 if number % 2 else -1]:
            seconds[name].append(models[name].turn())
    return seconds


def _judge(case: Case, seconds: Mapping[str, list[tuple[float, float]]]) -> list[Row]:
    base, base_cpu = zip(*seconds[BASELINE], strict=True)
    base_ms = 1e3 * statistics.median(base)
    rows = [Row(f"{case}/{BASELINE}", base_ms, "ms")]
    for name in seconds:
        if name == BASELINE:
            continue
        ours, ours_cpu = zip(*seconds[name], strict=True)
        ratios = [mine / other for mine, other in zip(ours, base, strict=True)]
        cpu_ratios = [mine / other for mine, other in zip(ours_cpu, base_cpu, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        # Row takes a target for the least; full tables have none to meet.
        ratio = Row(f"{case}/{name} over {BASELINE}", median, "x", 1.0)
        if name != FULL:
            ratio.target, ratio.met = TARGET, median <= TARGET
        cpu_ratio = statistics.median(cpu_ratios)
        tqdm.write(
            f"{ratio.name}: {median:.3f} (quartiles {lower:.3f}, {upper:.3f}; "
            f"CPU time {cpu_ratio:.3f})"
        )
        rows += [
            Row(f"{case}/{name}", 1e3 * statistics.median(ours), "ms", base_ms),
            ratio,
            Row(f"{ratio.name}/lower quartile", lower, "x"),
            Row(f"{ratio.name}/upper quartile", upper, "x"),
            Row(f"{ratio.name}/of CPU time", cpu_ratio, "x"),
        ]
        if FULL in seconds and name != FULL:
            full, _ = zip(*seconds[FULL], strict=True)
            of_full = statistics.median(
                mine / other for mine, other in zip(ours, full, strict=True)
            )
            rows.append(Row(f"{case}/{name} over {FULL}", of_full, "x", 1.0))
    return rows


def _effort(case: Case, *, quick: bool) -> tuple[int, int, int]:
    """Steps of the warm-up, rounds, and rounds under the profiler."""
    # A virtual shard hands out its rows every 16 steps.
    if case.batch * case.pooling > 8192:
        return (20, 6, 3) if quick else (40, 30, 10)
    return (32, 20, 8) if quick else (BATCHES[1], 60, 20)


def measure(
    case: Case,
    kinds: Sequence[str],
    ids: Tensor,
    device: torch.device,
    *,
    layers: Layers,
    quick: bool,
) -> list[Row]:
    """The figures of a case; prints where the time of its steps goes, if it is to be taken apart.

    Args:
        case: what is trained.
        kinds: names of :data:`KINDS`, the baseline among them.
        ids: of :func:`draw_ids`.
        device: CPU or the GPU.
        layers: the dense ones.
        quick: fewer steps.
    """
    batches = make_batches(case, ids)
    models = {name: Trained(case, KINDS[name], batches, device, layers) for name in kinds}
    warm_up, rounds, profiled = _effort(case, quick=quick)
    check(case, models, _warm_up(models, warm_up))
    rows = _judge(case, _take_turns(models, rounds))
    for name, model in models.items():
        rows.append(Row(f"{case}/{name}/resident", tc.resident_bytes(model.model), "bytes"))
    if case in PARTS_CASES:
        steps = {name: model.step for name, model in models.items()}
        parts = measure_parts(steps, BASELINE, profiled, STEPS_PER_TURN)
        tqdm.write(f"\n{parts_table(str(case), parts, BASELINE)}\n")
        rows += parts_rows(str(case), parts, BASELINE)
    return rows


def _plot(path: str, rows: Sequence[Row]) -> None:
    """Bars of the ratios, with their quartiles."""
    value = {row.name: row.value for row in rows}
    names = [row.name for row in rows if row.target is not None]
    heights = [value[name] for name in names]
    errors = [
        [value[name] - value[f"{name}/lower quartile"] for name in names],
        [value[f"{name}/upper quartile"] - value[name] for name in names],
    ]
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.5 * len(names)))
    axes.barh([name.replace("/", "\n") for name in names], heights, xerr=errors, capsize=3)
    axes.axvline(TARGET, color="red", linestyle="--", label=f"target: at most {TARGET}")
    axes.set(xlabel=f"time of a step / {BASELINE}'s (median and quartiles)")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="dim 16, few rounds: within a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kinds", default=",".join(DEFAULT_KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--cases", default="", help="DIM:BATCH[:POOLING],...; seven by default")
    parser.add_argument("--layers", choices=tuple(LAYERS), default="small", help="dense layers")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more, less steady")
    parser.add_argument("--json", default="", help="where to write the figures")
    parser.add_argument("--plot", default="", help="where to draw the ratios")
    options = parser.parse_args()
    kinds = list(dict.fromkeys([BASELINE, *options.kinds.split(",")]))
    try:
        cases = parse_cases(options.cases) if options.cases else CASES
    except ValueError as error:
        parser.error(str(error))
    if options.quick and not options.cases:
        cases = QUICK_CASES
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"--kinds must be of {', '.join(KINDS)}, got {', '.join(unknown)}")
    quieten()
    keep_freed_pages()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ids, layers = draw_ids(cases), LAYERS[options.layers]
    rows: list[Row] = []
    for case in tqdm(cases, desc="cases"):
        rows += measure(case, kinds, ids, device, layers=layers, quick=options.quick)
        gc.collect()  # models are full of cycles, and the next case needs the memory
    print_rows([row for row in rows if row.name.count("/") == 1])
    write_json(options.json, "train_step", rows)
    if options.plot:
        _plot(options.plot, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
