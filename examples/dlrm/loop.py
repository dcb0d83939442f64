"""One training and its evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from tqdm import tqdm

import torchrec_cafe as tc
from examples.dlrm.checkpoints import RunCheckpoints
from examples.dlrm.config import CUSTOM, EXACT_KINDS, UNCOMPRESSED_KINDS, TrainConfig
from examples.dlrm.data import BatchLoader, ClickLog, Split
from examples.dlrm.early_stopping import EarlyStopping
from examples.dlrm.evaluation import evaluate, progress_bar
from examples.dlrm.model import constraints, memory_of, shard
from examples.dlrm.scalars import Scalars, scalars_folder
from examples.dlrm.step_parts import median_parts, profile_parts
from examples.process import device

#: steps before the clock starts: first calls allocate and warm up
WARM_UP_STEPS = 10
_SCALARS_EVERY = 50

#: called before a training step with its number and the model
OnStep = Callable[[int, DistributedModelParallel], None]


@dataclass(frozen=True)
class Case:
    """One of the trainings that are compared.

    Attributes:
        kind: of :data:`examples.dlrm.config.KINDS`.
        compression: dense bytes / resident bytes to ask for; 1 for kinds without.
        seed: of the weights.
    """

    kind: str
    compression: float
    seed: int

    def label(self, config: TrainConfig) -> str:
        """Its name in progress bars, and, with underscores, of its folders."""
        label = self.kind
        if self.kind == CUSTOM:
            label += f" {Path(config.tables).stem}"
        elif self.kind not in EXACT_KINDS:
            label += f" {self.compression:g}x"
        return label + (f" seed {self.seed}" if len(config.seed) > 1 else "")


def cases(config: TrainConfig) -> list[Case]:
    """What to train, in order.

    Args:
        config: options of the run.
    """
    return [
        Case(kind, compression, seed)
        for seed in config.seed
        for kind in config.kinds
        for compression in ((1.0,) if kind in UNCOMPRESSED_KINDS else config.compression)
    ]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one training came to.

    Attributes:
        kind: of :data:`examples.dlrm.config.KINDS`.
        compression: dense bytes / resident bytes that was asked; 1 for kinds without.
        seed: of the weights.
        auc: area under the ROC curve of the test set, exact.
        log_loss: mean cross entropy of the test set, in nats.
        normalized_entropy: log-loss / that of predicting the test set's mean label.
        embedding_bytes: weights, sketches and maps as allocated, over all ranks.
        samples_per_second: of training, over all ranks, after a warm-up.
        tested_step: steps after which the tested state was reached.
        tested: ``"last"``, or ``"best"`` for the state of the best validation.
        memory: bytes by part as planned, see :class:`torchrec_cafe.MemoryBreakdown`.
        step_parts: milliseconds of a step's host time by part; empty if that was not taken.
    """

    kind: str
    compression: float
    seed: int
    auc: float
    log_loss: float
    normalized_entropy: float
    embedding_bytes: int
    samples_per_second: float
    tested_step: int = 0
    tested: str = "last"
    memory: Mapping[str, int] = field(default_factory=dict)
    step_parts: Mapping[str, float] = field(default_factory=dict)


def run(
    config: TrainConfig,
    log: ClickLog,
    kind: str,
    compression: float,
    seed: int,
    *,
    tables: Mapping[str, tc.ParameterConstraints] | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Train on the train split in order, ``config.epochs`` times, then evaluate on the test split.

    Args:
        config: options of the run.
        log: the data set.
        kind: of :data:`examples.dlrm.config.KINDS`.
        compression: of the compressed kinds.
        seed: of the weights.
        tables: how each table is kept; as ``kind`` says by default.
        on_step: called before each training step with its number and the model.

    Raises:
        ValueError: for options that the data does not allow.
    """
    training = Training(config, log, Case(kind, compression, seed), tables)
    training.train(on_step)
    return training.test()


@final
class Training:
    """One training: made, trained, tested, taken apart; by all ranks together.

    Args:
        config: options of the run.
        log: the data set.
        case: what is trained.
        tables: how each table is kept; as the case says by default.
    """

    def __init__(
        self,
        config: TrainConfig,
        log: ClickLog,
        case: Case,
        tables: Mapping[str, tc.ParameterConstraints] | None = None,
    ) -> None:
        """Make the model; see the class."""
        torch.manual_seed(case.seed)
        if tables is None:
            tables = constraints(config, log, case.kind, case.compression)
        self._config, self._log, self._case = config, log, case
        self._label = case.label(config)
        self._memory = memory_of(config, log, tables)
        self._model, self._optimizer = shard(config, log, tables, device())
        self._early = EarlyStopping(config.early_stopping) if config.early_stopping else None
        self._saved: RunCheckpoints | None = None
        if config.checkpoint_dir:
            folder = Path(config.checkpoint_dir) / self._label.replace(" ", "_")
            self._saved = RunCheckpoints(
                folder, config.checkpoint_every, self._model, self._optimizer, self._early
            )
        self._per_step = config.batch_size * dist.get_world_size()
        self._step, self._speed, self._tested = 0, 0.0, "last"

    def train(self, on_step: OnStep | None = None) -> None:
        """Train to the end, or until validations get no better; go on with what was saved.

        Args:
            on_step: called before each training step with its number and the model.

        Raises:
            ValueError: for options that the data does not allow.
        """
        loader = self._loader(self._log.train)
        steps = self._num_steps(len(loader))
        begin = self._saved.resume() if self._saved is not None else 0
        self._step = begin
        if begin >= steps or self._stopped:
            self._speed = self._saved.samples_per_second if self._saved is not None else 0.0
        else:
            self._train(loader, begin, steps, on_step)
        self._load_best()

    def restore(self) -> None:
        """Load what :meth:`train` would test, without training; needs ``config.checkpoint_dir``.

        Raises:
            ValueError: if the checkpoint is of other tables, naming them.
            FileNotFoundError: if there is no complete checkpoint.
        """
        assert self._saved is not None
        self._step = self._saved.load_trained()
        self._speed = self._saved.samples_per_second
        self._load_best()

    def test(self) -> Result:
        """Evaluate on the test split."""
        loader = self._loader(self._log.test, training=False)
        figures = evaluate(self._model, loader, f"test  {self._label}")
        resident = torch.tensor([tc.resident_bytes(self._model)], device=self._model.device)
        dist.all_reduce(resident)
        return Result(
            **vars(self._case),
            **vars(figures),
            embedding_bytes=int(resident),
            samples_per_second=self._speed,
            tested_step=self._step,
            tested=self._tested,
            memory=self._memory,
        )

    def profile(self, steps: int) -> dict[str, float]:
        """Where a training step's time goes, on this rank. Trains on: the model is spent then.

        Args:
            steps: how many to take apart, after a few that warm up.

        Returns:
            By part of the step, median milliseconds of the host; see
            :mod:`examples.dlrm.step_parts`.
        """
        loader = self._loader(self._log.train)
        batches = self._batches(loader, 0, WARM_UP_STEPS + steps)
        pipeline = self._pipeline()
        self._model.train()
        for _ in range(WARM_UP_STEPS):
            pipeline.progress(batches)
        taken = [profile_parts(lambda: pipeline.progress(batches), 1) for _ in range(steps)]
        pipeline.detach()
        return median_parts(taken)

    def _load_best(self) -> None:
        """Go back to the best validation, if there was one and it is saved."""
        if self._saved is not None and self._early is not None and self._early.best_step:
            self._step, self._tested = self._saved.load_best(), "best"

    @property
    def _stopped(self) -> bool:
        return self._early is not None and self._early.stopped

    def _loader(self, split: Split, *, training: bool = True) -> BatchLoader:
        return BatchLoader(
            split,
            self._log.features,
            batch_size=self._config.batch_size * (1 if training else 4),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            drop_last=training,
        )

    def _num_steps(self, of_an_epoch: int) -> int:
        config = self._config
        steps = config.epochs * of_an_epoch
        steps = min(steps, config.max_steps or steps)
        if steps == 0:
            raise ValueError(
                f"--batch_size {config.batch_size} on {dist.get_world_size()} ranks is more than "
                f"the {len(self._log.train)} training samples; use a smaller one"
            )
        if config.validate_every > steps:
            raise ValueError(
                f"--validate_every {config.validate_every} is more than the {steps} steps of the "
                "training, and would never come; use a smaller one"
            )
        return steps

    def _batches(self, loader: BatchLoader, begin: int, end: int) -> Iterator[Batch]:
        return (loader[step % len(loader)] for step in range(begin, end))

    def _pipeline(self) -> TrainPipelineSparseDist[Any, Any]:
        model, optimizer = self._model, self._optimizer
        if tc.lookahead_statistics(model):
            return tc.LookaheadTrainPipeline(
                model, optimizer, model.device, depth=self._config.depth
            )
        return TrainPipelineSparseDist(model, optimizer, model.device)

    def _train(self, loader: BatchLoader, begin: int, steps: int, on_step: OnStep | None) -> None:
        folder = scalars_folder(self._config.out, self._label)
        scalars = Scalars(folder, self._model, begin * self._per_step)
        clock = _Clock(begin + min(WARM_UP_STEPS, steps - 1 - begin), self._per_step)
        total, done = steps * self._per_step, begin * self._per_step
        with progress_bar(f"train {self._label}", total, done) as bar:
            while self._step < steps and not self._stopped:
                end = min(steps, self._next_validation())
                pipeline = self._pipeline()
                batches = self._batches(loader, self._step, end)
                self._model.train()
                for step in range(self._step, end):
                    clock.before(step)
                    if self._saved is not None and step > begin:
                        self._saved.save_at(step)
                    if on_step is not None:
                        on_step(step, self._model)
                    loss, *_ = pipeline.progress(batches)
                    bar.update(self._per_step)
                    if step % _SCALARS_EVERY == 0 or step == steps - 1:
                        bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
                        samples = (step + 1) * self._per_step
                        scalars.write(samples, float(loss), clock.samples_per_second(step + 1))
                pipeline.detach()
                self._step = end
                with clock.paused():
                    self._validate(scalars)
        self._speed = clock.samples_per_second(self._step) or 0.0
        _report_lookahead(self._model)
        scalars.close()
        if self._saved is not None:
            self._saved.save_end(self._step, self._speed)

    def _next_validation(self) -> int:
        every = self._config.validate_every
        return every * (self._step // every + 1) if every else sys.maxsize

    def _validate(self, scalars: Scalars) -> None:
        """Evaluate on the validation split, if it is time."""
        every, split = self._config.validate_every, self._log.validation
        if not every or self._step % every:
            return
        if split is None:
            raise ValueError("--validate_every needs a log with a validation split; see hold_out")
        loader = self._loader(split, training=False)
        figures = evaluate(self._model, loader, f"valid {self._label}", keep=False)
        scalars.write_validation(self._step * self._per_step, figures)
        better = self._early is not None and self._early.update(self._step, figures.log_loss)
        if better and self._saved is not None:
            self._saved.save_best(self._step)
        if dist.get_rank() == 0:
            tqdm.write(
                f"{self._label}, step {self._step:,}: validation AUC {figures.auc:.4f}, log-loss "
                f"{figures.log_loss:.5f}, NE {figures.normalized_entropy:.4f}"
                f"{', the best so far' if better else ''}{'; stopped' if self._stopped else ''}"
            )


@final
class _Clock:
    """Seconds of training since the warm-up, pauses apart."""

    def __init__(self, warm: int, samples_per_step: int) -> None:
        self._warm, self._samples_per_step = warm, samples_per_step
        self._start = time.perf_counter()

    def before(self, step: int) -> None:
        """Start when the warm-up is over."""
        if step == self._warm:
            self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop while something else goes on."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def samples_per_second(self, steps: int) -> float | None:
        """Over all ranks, when so many steps have been trained; ``None`` during the warm-up."""
        if steps <= self._warm:
            return None
        seconds = time.perf_counter() - self._start
        return (steps - self._warm) * self._samples_per_step / seconds


def _report_lookahead(model: nn.Module) -> None:
    if dist.get_rank() == 0:
        for name, statistics in tc.lookahead_statistics(model).items():
            tqdm.write(f"{name}, rank 0: {statistics}")
