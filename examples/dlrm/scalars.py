"""What TensorBoard shows of a training, and the same numbers for the report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchrec_cafe as tc
from examples.dlrm.evaluation import Figures


def scalars_folder(out: str, label: str) -> Path:
    """Where the scalars of a training lie.

    Args:
        out: the run's folder.
        label: of the training.
    """
    return Path(out) / "tensorboard" / label.replace(" ", "_")


class Scalars:
    """Writes scalars against the number of samples; only the first rank writes.

    Args:
        folder: of this training.
        model: what is trained.
        begin: samples trained before; what an earlier start wrote from there on is hidden.
    """

    def __init__(self, folder: Path, model: nn.Module, begin: int) -> None:
        """Begin to write; see the class."""
        self._model = model
        self._writer: SummaryWriter | None = None
        if dist.get_rank() == 0:
            self._writer = SummaryWriter(folder, purge_step=begin)

    def write(self, samples: int, loss: float, samples_per_second: float | None) -> None:
        """Write what is known of the training after so many samples."""
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

    def write_validation(self, samples: int, figures: Figures) -> None:
        """Write the figures of a validation after so many samples."""
        if self._writer is not None:
            for name, value in asdict(figures).items():
                self._writer.add_scalar(f"validation/{name}", value, samples)

    def close(self) -> None:
        """Write what is left to write."""
        if self._writer is not None:
            self._writer.close()


def read_scalars(folder: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """What was written under a name.

    Args:
        folder: of a training.
        name: the tag's part after the last slash, such as ``hot_share``.

    Returns:
        By the tag's part before it, numbers of samples and values in order; empty without any.
    """
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        prefix, _, last = tag.rpartition("/")
        if last == name:
            found[prefix] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found
