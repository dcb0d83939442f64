"""Checkpoints of one training, from which it goes on when it is started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

import torchrec_cafe as tc

_SPEED = "samples_per_second"


class RunCheckpoints:
    """Saves a training now and then, in the background, and at its end.

    Args:
        folder: of this training alone.
        every: steps between two saves; 0: only at the end.
        model: what is trained.
        optimizer: of the tables and the dense layers.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
    ) -> None:
        """Look for checkpoints; see the class."""
        self._every = every
        self._optimizer = optimizer
        self._state: dict[str, Any] = {"model": model, "optimizer": optimizer, _SPEED: 0.0}
        self._manager = tc.CheckpointManager(folder)

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
        if self._manager.latest() is None:
            return 0
        self._optimizer.init_state()
        return self._manager.load(self._state)

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
