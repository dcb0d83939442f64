"""All contact with FBGEMM beyond its documented stable interface."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor


class Update(NamedTuple):
    """FBGEMM's operator of an optimizer's step, and the names of its arguments."""

    operator: Callable[..., None]
    arguments: tuple[str, ...]


# Arguments of the operators that are the optimizer's; all others but those of a call are attributes
# of the TBE of the same name.
_OF_OPTIMIZER = frozenset(
    {"stochastic_rounding", "eps", "weight_decay", "weight_decay_mode", "max_norm"}
)
_KNOWN = _OF_OPTIMIZER | {
    *("grad_output", "indices", "offsets", "indice_weights", "pooling_mode", "output_dtype"),
    *("host_weights", "weights_placements", "weights_offsets", "D_offsets", "max_D"),
    *("hash_size_cumsum", "total_hash_size_bits", "learning_rate_tensor"),
    *("momentum1_host", "momentum1_placements", "momentum1_offsets"),
}


@functools.cache
def cpu_update(optimizer: EmbOptimType) -> Update | None:
    """The operator of an optimizer on a CPU; ``None``: there is none that is called as we know."""
    names = {
        EmbOptimType.EXACT_SGD: "sgd",
        EmbOptimType.EXACT_ADAGRAD: "adagrad",
        EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
    }
    if optimizer not in names:
        return None
    name = f"split_embedding_backward_codegen_{names[optimizer]}_cpu"
    operator = getattr(getattr(torch.ops.fbgemm, name, None), "default", None)
    if operator is None:
        return None
    schema = operator._schema  # noqa: SLF001  nothing else tells the arguments
    arguments = tuple(argument.name for argument in schema.arguments)
    return Update(operator, arguments) if _KNOWN.issuperset(arguments) else None


class RowRangeTBE(SplitTableBatchedEmbeddingBagsCodegen):
    """A stock TBE over one physical table whose consecutive row ranges are the logical tables.

    One physical table with one feature keeps FBGEMM's CPU backward on its fast path, and lets a
    bag mix rows of its own table with rows of the shared pool of hot rows. Only the two methods
    that describe the tables to the outside are overridden, both part of FBGEMM's stable API, so
    that weights, optimizer state and checkpoints appear table by table.

    Args:
        rows_per_table: rows of each logical table, in order, each >= 0.
        embedding_dim: columns, a multiple of 4.
        weights_precision: FP32 or FP16.
        device: where the rows live; CPU or CUDA.
        fused_params: the TBE's optimizer arguments, as TorchRec calls them.
        pooling_mode: how the TBE pools.
    """

    # FBGEMM's constructor may ask for the weights before the ranges are known.
    _row_ranges: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        rows_per_table: Sequence[int],
        embedding_dim: int,
        *,
        weights_precision: SparseType,
        device: torch.device,
        fused_params: dict[str, Any],
        pooling_mode: PoolingMode = PoolingMode.SUM,
    ) -> None:
        """Allocate the physical table; see the class."""
        # FBGEMM wants a row even on a rank that holds none; nobody looks it up.
        total = max(1, sum(rows_per_table))
        on_cuda = device.type == "cuda"
        super().__init__(
            embedding_specs=[
                (
                    total,
                    embedding_dim,
                    EmbeddingLocation.DEVICE if on_cuda else EmbeddingLocation.HOST,
                    ComputeDevice.CUDA if on_cuda else ComputeDevice.CPU,
                )
            ],
            feature_table_map=[0],
            pooling_mode=pooling_mode,
            weights_precision=weights_precision,
            device=device,
            # Rows come from the remap operator, which cannot produce one that is out of range.
            bounds_check_mode=BoundsCheckMode.NONE,
            **fused_params,
        )
        self._row_ranges = _ranges(rows_per_table)

    def physical_tensors(self) -> list[Tensor]:
        """The physical table and its row-wise optimizer states, first axis rows; views."""
        states = super().split_optimizer_states()
        return [super().split_embedding_weights()[0], *(states[0] if states else [])]

    @property
    def counts_by_row(self) -> bool:
        """Whether the optimizer keeps counters of each row, which are not among its states."""
        return (
            self._used_rowwise_adagrad_with_counter
            or self._used_rowwise_adagrad_with_global_weight_decay
            or self.use_rowwise_bias_correction
        )

    def pool(self, rows: Tensor, offsets: Tensor, factors: Tensor | None) -> Tensor:
        """Look up rows of the physical table and pool them by bag.

        Args:
            rows: int64 ``[N]``.
            offsets: int64 ``[B + 1]``, where each bag starts.
            factors: float32 ``[N]``, factor of each row; ``None``: all one.

        Returns:
            ``[B, D]``.
        """
        unneeded = None
        if factors is not None and not factors.requires_grad:
            # FBGEMM would compute the gradient of the factors unasked.
            unneeded = torch.zeros(1, dtype=torch.int32, device=factors.device)
        return self(
            indices=rows,
            offsets=offsets,
            per_sample_weights=factors,
            feature_requires_grad=unneeded,
        )

    def update(self, rows: Tensor, grads: Tensor) -> None:
        """Let the optimizer step on rows, as the backward pass of a lookup of each would.

        On a CPU FBGEMM's operator of that backward pass is called by itself, where it is known how:
        a lookup only for the sake of its gradient takes longer than the step.

        Args:
            rows: int64 ``[N]``, rows of the physical table, which may repeat.
            grads: float32 ``[N, D]``, their gradients.
        """
        starts = torch.arange(len(rows) + 1, device=rows.device)
        update = None if self.counts_by_row else cpu_update(self.optimizer)
        if update is None or rows.device.type != "cpu":
            with torch.enable_grad():
                looked_up = self(indices=rows, offsets=starts)
            looked_up.backward(grads)
            return
        options = self.optimizer_args
        if options.gradient_clipping:
            grads = grads.clamp(-options.max_gradient, options.max_gradient)
        given = {
            "grad_output": grads,
            "indices": rows,
            "offsets": starts,
            "indice_weights": None,
            "host_weights": self.weights_host,
        }
        update.operator(*(self._argument(name, given) for name in update.arguments))

    def _argument(self, name: str, given: dict[str, Any]) -> Any:  # noqa: ANN401  of any type
        """An argument of FBGEMM's operator: given, of the optimizer, or an attribute of the TBE."""
        if name in given:
            return given[name]
        return getattr(self.optimizer_args if name in _OF_OPTIMIZER else self, name)

    def presented_tensors(self) -> list[Tensor]:
        """The rows and states of all logical tables, one after the other."""
        return self.physical_tensors()

    def split_embedding_weights(self) -> list[Tensor]:
        """Weights of each logical table, as views."""
        weights = self.presented_tensors()[0]
        return [weights[begin:end] for begin, end in self._row_ranges]

    def split_optimizer_states(self) -> list[list[Tensor]]:
        """Optimizer states of each logical table, as views."""
        states = self.presented_tensors()[1:]
        if not states:
            return []
        return [[state[begin:end] for state in states] for begin, end in self._row_ranges]


class SlotTBE(RowRangeTBE):
    """A stock TBE whose rows are slots, and that presents the tables behind them to the outside.

    Args:
        num_slots: rows of the TBE, >= 1.
        embedding_dim: columns, a multiple of 4.
        options: as of :class:`RowRangeTBE`.
    """

    _tables: list[Tensor] | None = None
    _write_back: weakref.WeakMethod[Callable[[], None]] | None = None

    def __init__(self, num_slots: int, embedding_dim: int, **options: Any) -> None:
        """Allocate the slots; see the class."""
        super().__init__([num_slots], embedding_dim, **options)

    def present(
        self,
        tensors: list[Tensor],
        rows_per_table: Sequence[int],
        write_back: Callable[[], None],
    ) -> None:
        """Set what stands behind the slots.

        Args:
            tensors: weights and states of all tables, one after the other.
            rows_per_table: rows of each.
            write_back: a method that brings ``tensors`` up to date; not kept alive.
        """
        self._tables = tensors
        self._row_ranges = _ranges(rows_per_table)
        self._write_back = weakref.WeakMethod(write_back)

    def flush(self) -> None:
        """Bring what is presented up to date, as FBGEMM's does for its own cache."""
        write_back = None if self._write_back is None else self._write_back()
        if write_back is not None:
            write_back()

    @property
    def counts_lookups(self) -> bool:
        """Whether updates depend on how many lookups there have been, as Adam's do."""
        return self.optimizer not in (
            EmbOptimType.EXACT_SGD,
            EmbOptimType.EXACT_ADAGRAD,
            EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        )

    def presented_tensors(self) -> list[Tensor]:
        """See :meth:`RowRangeTBE.presented_tensors`."""
        return self.physical_tensors() if self._tables is None else self._tables


def _ranges(rows_per_table: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ends = list(itertools.accumulate(rows_per_table))
    return tuple(zip([0, *ends[:-1]], ends, strict=True))
