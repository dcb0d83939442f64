"""Which optimizers compressed tables can have: those whose state has a row for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

_ON_EVERY_DEVICE = (
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    EmbOptimType.EXACT_ADAGRAD,
    EmbOptimType.EXACT_SGD,
)
_ON_CUDA = (EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM)


def check_optimizer(
    table: str, bag: nn.Module, fused_params: dict[str, Any] | None, device: str
) -> None:
    """Refuse an optimizer whose state cannot follow a row that gets another owner.

    Args:
        table: name of the table.
        bag: its module, whose weight knows of ``apply_optimizer_in_backward``.
        fused_params: of the sharder; without an optimizer, FBGEMM's default is meant.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: naming the table, the optimizer, and those that work.
    """
    allowed = _ON_EVERY_DEVICE + (_ON_CUDA if device == "cuda" else ())
    for optimizer in _given(bag, fused_params):
        if optimizer not in allowed:
            name = getattr(optimizer, "name", getattr(optimizer, "__name__", optimizer))
            raise ValueError(
                f"table {table!r}: a compressed table's optimizer on {device} must be "
                f"{', '.join(kind.name for kind in allowed)}, got {name}; use one of these "
                "(EXACT_ROWWISE_ADAGRAD is the usual choice) or leave the table uncompressed"
            )


def _fused(optimizer: type[Any]) -> object:
    """FBGEMM's name of an optimizer class, or the class itself if FBGEMM has none."""
    try:
        return optimizer_type_to_emb_opt_type(optimizer)
    except ValueError:
        return optimizer


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps for a row, in float32.

    Attributes:
        values_per_weight: values for each weight of a row.
        values_per_row: values for the row as a whole.
        dim: weights of a row.
    """

    values_per_weight: int
    values_per_row: int
    dim: int

    def of_row(self, dim: int) -> int:
        """Bytes of the state of a row of so many weights."""
        return 4 * (self.values_per_weight * dim + self.values_per_row)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of the state of a row."""
        return self.of_row(self.dim)

    @property
    def bytes_if_one_value(self) -> int:
        """Bytes of the values that a row has one of."""
        return 4 * self.values_per_row


_STATES = {
    EmbOptimType.EXACT_SGD: (0, 0),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (0, 1),
    EmbOptimType.EXACT_ADAGRAD: (1, 0),
    EmbOptimType.ADAM: (2, 0),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (1, 1),
}


def optimizer_state(
    bag: nn.Module, fused_params: dict[str, Any] | None, dim: int
) -> OptimizerState:
    """What the optimizer of a table keeps for a row.

    Args:
        bag: the table's module, whose weight knows of ``apply_optimizer_in_backward``.
        fused_params: of the sharder; without an optimizer, FBGEMM's default is meant.
        dim: weights of a row.
    """
    values_per_weight, values_per_row = _STATES.get(_given(bag, fused_params)[0], (2, 0))
    return OptimizerState(values_per_weight, values_per_row, dim)


def _given(bag: nn.Module, fused_params: dict[str, Any] | None) -> list[Any]:
    classes = getattr(bag.weight, "_optimizer_classes", None)
    if classes:
        return [_fused(optimizer) for optimizer in classes]
    return [(fused_params or {}).get("optimizer", EmbOptimType.EXACT_SGD)]
