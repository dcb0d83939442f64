"""Which optimizers tables with a kind can have: those whose state has a row for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

from torchrec_cafe.distributed._torchrec import EmbeddingShardingInfo
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup

_ON_EVERY_DEVICE = (
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    EmbOptimType.EXACT_ADAGRAD,
    EmbOptimType.EXACT_SGD,
)
_ON_CUDA = (EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM)
# With row-wise Adagrad, these count the updates of each row.
_COUNTING = (WeightDecayMode.COUNTER, WeightDecayMode.COWCLIP, WeightDecayMode.DECOUPLE_GLOBAL)


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
        ValueError: naming the table, the optimizer or the setting, and those that work.
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
    counting = _counting(bag, fused_params)
    if counting is not None:
        raise ValueError(
            f"table {table!r}: the optimizer of a table with `table=` must keep nothing of a row "
            f"but its momenta, got {counting}, which counts the updates of each row; "
            "use weight_decay_mode=WeightDecayMode.L2 or DECOUPLE without such counts, or leave "
            "`table` out"
        )


def _counting(bag: nn.Module, fused_params: dict[str, Any] | None) -> str | None:
    """The setting by which an optimizer counts the updates of each row, if there is one."""
    given = getattr(bag.weight, "_optimizer_kwargs", None) or []
    params = {name: value for some in (fused_params or {}, *given) for name, value in some.items()}
    mode = params.get("weight_decay_mode")
    if mode in _COUNTING and EmbOptimType.EXACT_ROWWISE_ADAGRAD in _given(bag, fused_params):
        return f"weight_decay_mode={WeightDecayMode(mode).name}"
    config = params.get("extra_optimizer_config")
    if getattr(config, "use_rowwise_bias_correction", False):
        return "use_rowwise_bias_correction"
    return None


def _fused(optimizer: type[Any]) -> object:
    """FBGEMM's name of an optimizer class, or the class itself if FBGEMM has none."""
    try:
        return optimizer_type_to_emb_opt_type(optimizer)
    except ValueError:
        return optimizer


def check_one_optimizer(infos: dict[str, list[EmbeddingShardingInfo]]) -> None:
    """Refuse two optimizers in a group, whose tables live in one TBE.

    Args:
        infos: of the tables of a collection, by sharding type.

    Raises:
        ValueError: naming two tables and their optimizers.
    """
    params: dict[CompressedGroup, tuple[str, dict[str, Any]]] = {}
    for info in (info for group in infos.values() for info in group):
        group = (info.fused_params or {}).get(GROUP_PARAM)
        if group is None:
            continue
        name = info.embedding_config.name
        first, expected = params.setdefault(group, (name, info.fused_params or {}))
        if info.fused_params != expected:
            raise ValueError(
                f"tables {first!r} and {name!r} share the group {group.name!r}, so they must have "
                f"the same optimizer and fused parameters, got {expected} and {info.fused_params}; "
                "give them kinds that differ (say, in compression) to keep them apart"
            )


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
