"""When a training has learned what it can."""

from __future__ import annotations

import math
from typing import Any, final


@final
class EarlyStopping:
    """Stops a training whose validations get no better.

    Its state is saved with the training, so that one that is resumed stops when it would have.

    Args:
        patience: validations without a lower log-loss after which to stop; 0: never.
    """

    def __init__(self, patience: int) -> None:
        """Begin; see the class."""
        self._patience = patience
        self._best_log_loss = math.inf
        self._best_step = 0
        self._in_vain = 0

    @property
    def best_step(self) -> int:
        """Steps that had been trained at the best validation; 0 before the first."""
        return self._best_step

    @property
    def stopped(self) -> bool:
        """Whether to stop."""
        return 0 < self._patience <= self._in_vain

    def update(self, step: int, log_loss: float) -> bool:
        """Note a validation.

        Args:
            step: steps that have been trained.
            log_loss: of the validation, the same on every rank; NaN is no improvement.

        Returns:
            Whether it is the best so far.
        """
        better = log_loss < self._best_log_loss
        self._in_vain = 0 if better else self._in_vain + 1
        if better:
            self._best_log_loss, self._best_step = log_loss, step
        return better

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {
            "best_log_loss": self._best_log_loss,
            "best_step": self._best_step,
            "in_vain": self._in_vain,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: of :meth:`state_dict`.
        """
        self._best_log_loss = state["best_log_loss"]
        self._best_step = state["best_step"]
        self._in_vain = state["in_vain"]
