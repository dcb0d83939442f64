"""One training and its evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.classification import binary_auroc
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer
from tqdm import tqdm

import torchrec_cafe as tc
from examples.dlrm.checkpoints import RunCheckpoints
from examples.dlrm.config import EXACT_KINDS, TrainConfig
from examples.dlrm.data import BatchLoader, ClickLog
from examples.dlrm.model import constraints, shard
from examples.process import device as this_device

#: steps before the clock starts: first calls allocate and warm up
WARM_UP_STEPS = 10
_SCALARS_EVERY = 50

#: called before a training step with its number and the model
OnStep = Callable[[int, DistributedModelParallel], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one training came to.

    Attributes:
        kind: of :data:`examples.dlrm.config.KINDS`.
        compression: dense bytes / resident bytes that was asked; 1 for full tables.
        seed: of the weights.
        auc: area under the ROC curve of the test set, exact.
        log_loss: mean cross entropy of the test set, in nats.
        embedding_bytes: weights, sketches and maps as allocated, over all ranks.
        samples_per_second: of training, over all ranks, after a warm-up.
    """

    kind: str
    compression: float
    seed: int
    auc: float
    log_loss: float
    embedding_bytes: int
    samples_per_second: float


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
    """
    device = this_device()
    torch.manual_seed(seed)
    if tables is None:
        tables = constraints(config, log, kind, compression)
    model, optimizer = shard(config, log, tables, device)
    label = kind if kind in EXACT_KINDS else f"{kind} {compression:g}x"
    label += f" seed {seed}" if len(config.seed) > 1 else ""
    saved = None
    if config.checkpoint_dir:
        folder = Path(config.checkpoint_dir) / label.replace(" ", "_")
        saved = RunCheckpoints(folder, config.checkpoint_every, model, optimizer)
    speed = _train(config, log, model, optimizer, label, on_step, saved)
    auc, log_loss = _evaluate(config, log, model, device, label)
    resident = torch.tensor([tc.resident_bytes(model)], dtype=torch.int64, device=device)
    dist.all_reduce(resident)
    return Result(
        kind=kind,
        compression=1.0 if kind in EXACT_KINDS else compression,
        seed=seed,
        auc=auc,
        log_loss=log_loss,
        embedding_bytes=int(resident),
        samples_per_second=speed,
    )


def _loader(config: TrainConfig, log: ClickLog, *, train: bool) -> BatchLoader:
    return BatchLoader(
        log.train if train else log.test,
        log.features,
        batch_size=config.batch_size if train else 4 * config.batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        drop_last=train,
    )


def _bar(label: str, total: int, done: int = 0) -> tqdm:
    """A progress bar on rank 0; a line now and then where the output is no terminal."""
    return tqdm(
        desc=label,
        total=total,
        initial=done,
        unit=" samples",
        unit_scale=True,
        mininterval=1.0,
        disable=dist.get_rank() != 0,
    )


def _num_steps(config: TrainConfig, log: ClickLog, of_an_epoch: int) -> int:
    steps = config.epochs * of_an_epoch
    steps = min(steps, config.max_steps or steps)
    if steps == 0:
        raise ValueError(
            f"--batch_size {config.batch_size} on {dist.get_world_size()} ranks is more than the "
            f"{len(log.train.labels)} training samples; use a smaller one"
        )
    return steps


def _train(
    config: TrainConfig,
    log: ClickLog,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    label: str,
    on_step: OnStep | None,
    saved: RunCheckpoints | None,
) -> float:
    """Samples per second, over all ranks, since the training was last started."""
    loader = _loader(config, log, train=True)
    steps = _num_steps(config, log, len(loader))
    begin = saved.resume() if saved is not None else 0
    if saved is not None and begin >= steps:
        return saved.samples_per_second
    pipeline = _pipeline(config, model, optimizer)
    batches = (loader[step % len(loader)] for step in range(begin, steps))
    per_step = config.batch_size * dist.get_world_size()
    scalars = _Scalars(config, label, model)
    warm = begin + min(WARM_UP_STEPS, steps - 1 - begin)
    start = time.perf_counter()
    model.train()
    with _bar(f"train {label}", steps * per_step, begin * per_step) as bar:
        for step in range(begin, steps):
            if step == warm:
                start = time.perf_counter()
            if saved is not None and step > begin:
                saved.save_at(step)
            if on_step is not None:
                on_step(step, model)
            loss, *_ = pipeline.progress(batches)
            bar.update(per_step)
            if step % _SCALARS_EVERY == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
                elapsed = time.perf_counter() - start
                speed = (step - warm) * per_step / elapsed if step > warm else None
                scalars.write((step + 1) * per_step, float(loss), speed)
    speed = (steps - warm) * per_step / (time.perf_counter() - start)
    pipeline.detach()
    _report_lookahead(model)
    scalars.close()
    if saved is not None:
        saved.save_end(steps, speed)
    return speed


def _report_lookahead(model: nn.Module) -> None:
    if dist.get_rank() == 0:
        for name, statistics in tc.lookahead_statistics(model).items():
            tqdm.write(f"{name}, rank 0: {statistics}")


def _pipeline(
    config: TrainConfig, model: DistributedModelParallel, optimizer: CombinedOptimizer
) -> TrainPipelineSparseDist[Any, Any]:
    if tc.lookahead_statistics(model):
        return tc.LookaheadTrainPipeline(model, optimizer, model.device, depth=config.depth)
    return TrainPipelineSparseDist(model, optimizer, model.device)


class _Scalars:
    """What TensorBoard shows of a training; only the first rank writes."""

    def __init__(self, config: TrainConfig, label: str, model: nn.Module) -> None:
        self._model = model
        self._writer: SummaryWriter | None = None
        if dist.get_rank() == 0:
            folder = Path(config.out) / "tensorboard" / label.replace(" ", "_")
            self._writer = SummaryWriter(folder)

    def write(self, samples: int, loss: float, samples_per_second: float | None) -> None:
        """Write what is known after so many samples."""
        if self._writer is None:
            return
        self._writer.add_scalar("train/loss", loss, samples)
        if samples_per_second is not None:
            self._writer.add_scalar("train/samples_per_second", samples_per_second, samples)
        scalars = tc.pool_statistics(self._model)
        for name, statistics in tc.lookahead_statistics(self._model).items():
            scalars[name] = statistics.scalars()
        for name, of_name in scalars.items():
            for statistic, value in of_name.items():
                self._writer.add_scalar(f"{name}/{statistic}", value, samples)

    def close(self) -> None:
        """Write what is left to write."""
        if self._writer is not None:
            self._writer.close()


@torch.no_grad()
def _evaluate(
    config: TrainConfig,
    log: ClickLog,
    model: DistributedModelParallel,
    device: torch.device,
    label: str,
) -> tuple[float, float]:
    """AUC and log-loss of the test set, the same on every rank."""
    loader = _loader(config, log, train=False)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    model.eval()
    with _bar(f"test  {label}", len(log.test.labels)) as bar:
        for batch in loader:
            _, (_, logit, label_) = model(batch.to(device))
            logits.append(logit.view(-1).cpu())
            labels.append(label_.view(-1).cpu())
            bar.update(len(batch.labels) * dist.get_world_size())
    parts: list[tuple[Tensor, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (torch.cat(logits), torch.cat(labels)))
    whole = [part for part in parts if part is not None]
    logit = torch.cat([part[0] for part in whole]).double()
    target = torch.cat([part[1] for part in whole])
    auc = binary_auroc(logit.sigmoid(), target.int(), thresholds=None)
    log_loss = nn.functional.binary_cross_entropy_with_logits(logit, target.double())
    return float(auc), float(log_loss)
