"""Which optimizers compressed tables can have: those whose state has a row for each row."""

from __future__ import annotations

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
    given = [(fused_params or {}).get("optimizer", EmbOptimType.EXACT_SGD)]
    classes = getattr(bag.weight, "_optimizer_classes", None)
    if classes:
        given = [_fused(optimizer) for optimizer in classes]
    for optimizer in given:
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
