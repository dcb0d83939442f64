"""Checkpoints of one training, from which it goes on when it is started again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

import torchrec_cafe as tc
from examples.dlrm.early_stopping import EarlyStopping

_SPEED = "samples_per_second"


class RunCheckpoints:
    """Saves a training now and then, in the background, and at its end; and its best state.

    Args:
        folder: of this training alone.
        every: steps between two saves; 0: only at the end.
        model: what is trained.
        optimizer: of the tables and the dense layers.
        early: when the training stops, if that is not only at its end; saved with it.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        early: EarlyStopping | None = None,
    ) -> None:
        """Look for checkpoints; see the class."""
        self._every = every
        self._optimizer = optimizer
        self._early = early
        self._state: dict[str, Any] = {"model": model, "optimizer": optimizer, _SPEED: 0.0}
        self._manager = tc.CheckpointManager(folder)
        if early is not None:
            self._state["early_stopping"] = early
            # Of the model alone: nothing goes on from it.
            self._best = tc.CheckpointManager(folder / "best", keep=1)

    @property
    def samples_per_second(self) -> float:
        """Speed of a training that is through; 0 before."""
        return self._state[_SPEED]

    def resume(self) -> int:
        """Load the last complete checkpoint, if there is one.

        Returns:
            Steps that have been trained.

        Raises:
            ValueError: if it is of another model, naming the tables.
        """
        step = self.load_trained() if self._manager.latest() is not None else 0
        if self._early is not None:
            self._forget_after(self._early.best_step)
        return step

    def load_trained(self) -> int:
        """Load the last complete checkpoint.

        Returns:
            Steps that have been trained.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is of another model, naming the tables.
        """
        self._optimizer.init_state()
        return self._manager.load(self._state)

    def load_best(self) -> int:
        """Load the model as it was at the best validation.

        Returns:
            Steps that had been trained.

        Raises:
            FileNotFoundError: if it is not there as a whole.
            ValueError: if it is of another model, naming the tables.
        """
        assert self._early is not None
        return self._best.load({"model": self._state["model"]}, self._early.best_step)

    def save_best(self, step: int) -> None:
        """Save the model as the best so far, in place of the one before.

        Args:
            step: steps that have been trained.
        """
        self._best.save({"model": self._state["model"]}, step)

    def save_at(self, step: int) -> None:
        """Save if it is time; training goes on meanwhile.

        Args:
            step: steps that have been trained.
        """
        if self._every and step % self._every == 0:
            self._manager.async_save(self._state, step)

    def save_end(self, step: int, samples_per_second: float) -> None:
        """Save what has been trained to the end; it is on the disk when this returns.

        Args:
            step: steps that have been trained.
            samples_per_second: of the training.
        """
        self._manager.wait()
        self._state[_SPEED] = samples_per_second
        self._manager.save(self._state, step)

    def _forget_after(self, step: int) -> None:
        """Remove best states that a training which is resumed before them has yet to reach."""
        if dist.get_rank() == 0:
            for later in [saved for saved in self._best.steps() if saved > step]:
                shutil.rmtree(self._best.folder / f"step_{later}")
        dist.barrier()
