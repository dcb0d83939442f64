"""One training of the accuracy study, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

import torchrec_cafe as tc
from benchmarks.quality_oracle import Budget, fingerprint, keep_spread, oracle_log
from benchmarks.quality_variants import Variant, per_table, variant
from examples.dlrm.config import TrainConfig
from examples.dlrm.data import ClickLog, load_click_log
from examples.dlrm.data.generator import NUM_DAYS, NUM_EMBEDDINGS, RESHUFFLED, write_generated
from examples.dlrm.data.storage import open_click_log, prepare_once
from examples.dlrm.loop import OnStep
from examples.dlrm.loop import run as train
from examples.dlrm.memory import keep_freed_pages
from examples.dlrm.model import check_budgets, table_shapes
from examples.dlrm.report import command_output
from examples.process import quieten

BATCH_SIZE = 8192
#: what a record says: trained, refused because the budget is too small, or failed
DONE, REFUSED, FAILED = "done", "refused", "failed"


@dataclass(frozen=True)
class DataSet:
    """A data set of the study.

    Attributes:
        title: for the report.
        text: for the report.
        over_arch: the model's hidden layers.
        compressions: what to train by default.
        drift: of the generator: share of ids that swap popularity every day.
    """

    title: str
    text: str
    over_arch: tuple[int, ...]
    compressions: tuple[float, ...]
    drift: float = 0.0


DATA = {
    "promotions": DataSet(
        "Promotions",
        "Complete Journey promotions: did the product sell in that store that week? Simulated from "
        "real shopping patterns, says its package. Weeks 1-44 train, weeks 45-53 test.",
        (256, 128),
        (10.0, 100.0, 1000.0),
    ),
    "generator": DataSet(
        "Generator",
        "Generated, not real: Criteo Kaggle's 26 cardinalities, Zipf popularity, planted effects "
        "of ids and of pairs.",
        (128, 64),
        (10.0, 100.0, 1000.0, 10000.0),
    ),
    "generator_drift": DataSet(
        "Generator with drift",
        f"The same, but {RESHUFFLED:.0%} of the ids swap popularity every day, for {NUM_DAYS} "
        "days; the test rows follow on the last day.",
        (128, 64),
        (10.0, 100.0, 1000.0, 10000.0),
        drift=RESHUFFLED,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        data: of :data:`DATA`.
        variant: see :func:`benchmarks.quality_variants.variant`.
        compression: dense bytes / bytes; 1 for full tables.
        seed: of the weights.
    """

    data: str
    variant: str
    compression: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.variant}@{self.compression:g}x_seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """Where a study keeps its things.

    Attributes:
        out: folder of the records.
        cache_dir: folder of the data.
        quick: whether to train on small data.
    """

    out: Path
    cache_dir: Path
    quick: bool = False

    @property
    def data_dir(self) -> Path:
        """Where data made for the study lies; that of a quick one goes with it."""
        return self.out / "data" if self.quick else self.cache_dir

    def record(self, run: Run) -> Path:
        """The file that says what a run came to."""
        return self.out / run.data / f"{run.name}.json"

    def scratch(self, run: Run, suffix: str = "") -> Path:
        """Where a run keeps its log and TensorBoard's scalars."""
        return self.out / "logs" / run.data / f"{run.name}{suffix}"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record under another name first, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def load(study: Study, data: str, *, progress: bool = False) -> ClickLog:
    """The log of a data set, prepared if it is not yet.

    Args:
        study: a quick one has a small log.
        data: of :data:`DATA`.
        progress: whether to show a progress bar while preparing.
    """
    if not study.quick:
        return load_click_log(data, cache_dir=study.cache_dir, progress=progress)
    if data == "promotions":
        return load_click_log(data, cache_dir=study.cache_dir, sample=100_000, progress=progress)
    folder = study.data_dir / data
    small = tuple(math.ceil(size / 100) for size in NUM_EMBEDDINGS)

    def write(partial: Path) -> None:
        drift = DATA[data].drift
        write_generated(partial, 100_000, 20_000, num_embeddings=small, reshuffled=drift)

    prepare_once(folder, write)
    return open_click_log(folder)


def settings(study: Study, run: Run) -> TrainConfig:
    """The options of a run, defaults apart.

    Args:
        study: where the run keeps its things.
        run: the run.

    Raises:
        ValueError: if an argument of Cafe cannot be used.
    """
    chosen = variant(run.variant)
    return TrainConfig(
        data=run.data,
        cache_dir=str(study.cache_dir),
        full=True,
        kinds=(chosen.kind,),
        compression=(run.compression,),
        cafe=chosen.cafe,
        mem_rec=chosen.mem_rec,
        epochs=chosen.epochs,
        over_arch=DATA[run.data].over_arch,
        batch_size=BATCH_SIZE,
        seed=(run.seed,),
        out=str(study.scratch(run)),
    )


@dataclass
class _Plan:
    """What to train, once the budget is known to be large enough."""

    log: ClickLog
    tables: Mapping[str, tc.ParameterConstraints] | None
    hooks: list[OnStep]
    extra: dict[str, Any]


def _plan(study: Study, config: TrainConfig, log: ClickLog, chosen: Variant, run: Run) -> _Plan:
    """Divide the budget.

    Raises:
        ValueError: if it is too small.
    """
    shapes = table_shapes(config, log)
    plan = _Plan(log, None, [], {})
    if chosen.oracle:
        budget = Budget.of(shapes, run.compression)
        plan.log = oracle_log(log, budget, study.data_dir)
        plan.hooks.append(keep_spread(log, plan.log))
        plan.extra["hot_rows"] = budget.hot_rows
    elif chosen.per_table:
        plan.tables, counts = per_table(shapes, run.compression)
        plan.extra |= counts
    else:
        check_budgets(config, log)
    if chosen.hook is not None:
        plan.hooks.append(chosen.hook(len(log.train) / BATCH_SIZE / NUM_DAYS))
    return plan


def _train(config: TrainConfig, plan: _Plan, run: Run) -> dict[str, Any]:
    trained: list[DistributedModelParallel] = []

    def on_step(step: int, model: DistributedModelParallel) -> None:
        if step == 0:
            trained.append(model)
        for hook in plan.hooks:
            hook(step, model)

    (kind,) = config.kinds
    result = train(
        config, plan.log, kind, run.compression, run.seed, tables=plan.tables, on_step=on_step
    )
    measured = ("auc", "log_loss", "embedding_bytes", "samples_per_second")
    pools = tc.pool_statistics(trained[0])
    return {name: getattr(result, name) for name in measured} | plan.extra | {"pools": pools}


def execute(study: Study, run: Run) -> dict[str, Any]:
    """Train and evaluate, and write the record, also of a failure.

    Args:
        study: where the run keeps its things.
        run: the run.

    Returns:
        The record.
    """
    quieten()
    keep_freed_pages()
    torch.set_num_threads(1)
    start = time.perf_counter()
    record: dict[str, Any] = vars(run) | {
        "status": FAILED,
        "commit": command_output("git", "describe", "--always", "--dirty"),
    }
    try:
        config = settings(study, run)
        defaults = dataclasses.asdict(TrainConfig())
        record["config"] = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if value != defaults[name]
        }
        log = load(study, run.data)
        record["fingerprint"] = fingerprint(log)
        try:
            plan = _plan(study, config, log, variant(run.variant), run)
        except ValueError as error:
            record |= {"status": REFUSED, "error": str(error)}
        else:
            # No port and no other process: runs may go on side by side.
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            record |= _train(config, plan, run) | {"status": DONE}
    except Exception as error:  # noqa: BLE001  the study goes on without this run
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {error}"
    record["seconds"] = round(time.perf_counter() - start, 1)
    write_record(study.record(run), record)
    return record


def restore(study: Study, results: Path) -> int:
    """Take the runs of a results file as trained, such as those of another machine.

    Args:
        study: where they are to lie; what it has trained itself stays.
        results: a JSON file that a report was written to.

    Returns:
        How many were taken.

    Raises:
        ValueError: if the file is no report of the study.
    """
    try:
        found = json.loads(results.read_text())["runs"]
        names = [field.name for field in dataclasses.fields(Run)]
        records = {study.record(Run(*(r[name] for name in names))): r for r in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--restore must be the JSON file of an earlier report, got {results}: {error!r}"
        ) from None
    missing = {path: record for path, record in records.items() if not path.is_file()}
    for path, record in missing.items():
        write_record(path, record)
    return len(missing)


def read_records(study: Study, folders: Sequence[str]) -> list[dict[str, Any]]:
    """All records of some folders of a study.

    Args:
        study: where they lie.
        folders: names of data sets.
    """
    paths = [path for name in folders for path in sorted((study.out / name).glob("[!.]*.json"))]
    return [json.loads(path.read_text()) for path in paths]
