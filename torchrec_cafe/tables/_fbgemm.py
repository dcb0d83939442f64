"""All contact with FBGEMM beyond its documented stable interface."""

from __future__ import annotations

import functools
import itertools
import operator
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

#: an operator of torch.ops
Operator = torch._ops.OpOverload  # noqa: SLF001  it has no other name

# Arguments of FBGEMM's operators: of a call, of the optimizer, and attributes of the TBE.
_OF_CALL = ("grad_output", "indices", "offsets")
_OF_OPTIMIZER = frozenset(
    {"stochastic_rounding", "eps", "weight_decay", "weight_decay_mode", "max_norm"}
)
_OF_TBE = frozenset(
    {
        *("weights_placements", "weights_offsets", "D_offsets", "max_D", "hash_size_cumsum"),
        *("total_hash_size_bits", "pooling_mode", "learning_rate_tensor", "output_dtype"),
        *("momentum1_host", "momentum1_placements", "momentum1_offsets"),
    }
)
_KNOWN = {*_OF_CALL, *_OF_OPTIMIZER, *_OF_TBE, "host_weights", "indice_weights"}


def cpu_update(optimizer: EmbOptimType) -> Operator | None:
    """FBGEMM's operator of an optimizer's step on a CPU.

    Args:
        optimizer: of a TBE.

    Returns:
        ``None`` if there is none that is called as we know.
    """
    names = {
        EmbOptimType.EXACT_SGD: "sgd",
        EmbOptimType.EXACT_ADAGRAD: "adagrad",
        EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
    }
    name = f"split_embedding_backward_codegen_{names.get(optimizer)}_cpu"
    found = getattr(getattr(torch.ops.fbgemm, name, None), "default", None)
    if found is None:
        return None
    arguments = {argument.name for argument in found._schema.arguments}  # noqa: SLF001
    return found if set(_OF_CALL) <= arguments <= _KNOWN else None


def _are_same(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether the objects of both are the same ones."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


class _Views(NamedTuple):
    """What FBGEMM shows of some tensors, and where the first of them lay then."""

    owners: tuple[Tensor, ...]
    address: int
    views: tuple[Tensor, ...]

    def are_of(self, owners: tuple[Tensor, ...]) -> bool:
        """Whether they still show these tensors."""
        return _are_same(owners, self.owners) and owners[0].data_ptr() == self.address


class _Update:
    """FBGEMM's operator, with all arguments that stay the same from call to call.

    Args:
        update: of :func:`cpu_update`.
        owners: the tensors that it changes, the optimizer's options, and its learning rate.
        arguments: in its order, whatever where a call gives them.
    """

    def __init__(self, update: Operator, owners: tuple[object, ...], arguments: list[Any]) -> None:
        """Find the places of what a call gives; see the class."""
        names = [argument.name for argument in update._schema.arguments]  # noqa: SLF001
        self._operator = update
        self._owners = owners
        self._arguments = arguments
        self._places = [names.index(name) for name in _OF_CALL]

    def is_of(self, owners: tuple[object, ...]) -> bool:
        """Whether it changes these tensors with these options."""
        return _are_same(owners, self._owners)

    def __call__(self, grads: Tensor, rows: Tensor, offsets: Tensor) -> None:
        """Step.

        Args:
            grads: of the rows.
            rows: of the table.
            offsets: 0, 1, ..., number of rows.
        """
        arguments = list(self._arguments)
        for place, value in zip(self._places, (grads, rows, offsets), strict=True):
            arguments[place] = value
        self._operator(*arguments)


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
    _views: _Views | None = None
    _update: _Update | None = None

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
        self._no_gradient = torch.zeros(1, dtype=torch.int32, device=device)
        self._ascending = torch.arange(1, device=device)

    def physical_tensors(self) -> list[Tensor]:
        """The physical table and its row-wise optimizer states, first axis rows; views."""
        owners = self._owners()
        if self._views is None or not self._views.are_of(owners):
            states = super().split_optimizer_states()
            views = super().split_embedding_weights()[0], *(states[0] if states else [])
            # FBGEMM takes its time over them, and they are asked for in every step.
            self._views = _Views(owners, owners[0].data_ptr(), views)
        return list(self._views.views)

    @functools.cached_property
    def _owner_places(self) -> tuple[tuple[dict[str, Any], str], ...]:
        """Which of the module's dictionaries each owner is in, and its name there."""
        where = "dev" if self.current_device.type == "cuda" else "host"
        has_state = self.optimizer != EmbOptimType.EXACT_SGD
        names = (f"weights_{where}", *([f"momentum1_{where}"] if has_state else []))
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return tuple((parameters if name in parameters else buffers, name) for name in names)

    def _owners(self) -> tuple[Tensor, ...]:
        """The tensors whose memory the physical table and its first state are in."""
        # In every step, where a module's own search takes longer than all else here.
        return tuple([of_kind[name] for of_kind, name in self._owner_places])

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
        # FBGEMM would compute the gradient of the factors unasked.
        is_unneeded = factors is not None and not factors.requires_grad
        return self(
            indices=rows,
            offsets=offsets,
            per_sample_weights=factors,
            feature_requires_grad=self._no_gradient if is_unneeded else None,
        )

    def share_learning_rate(self, other: RowRangeTBE) -> None:
        """Step at the learning rate of another TBE from now on, also when that is set anew.

        Args:
            other: on the same device.
        """
        self.learning_rate_tensor = other.learning_rate_tensor

    def update(self, rows: Tensor, grads: Tensor) -> None:
        """Let the optimizer step on rows, as the backward pass of a lookup of each would.

        On a CPU FBGEMM's operator of that backward pass is called by itself, where it is known how:
        a lookup only for the sake of its gradient takes longer than the step.

        Args:
            rows: int64 ``[N]``, rows of the physical table, which may repeat.
            grads: float32 ``[N, D]``, their gradients.
        """
        starts = self._first_numbers(rows.shape[0] + 1)
        update = self._cpu_update
        if update is None:
            with torch.enable_grad():
                looked_up = self(indices=rows, offsets=starts)
            looked_up.backward(grads)
            return
        options = self.optimizer_args
        if options.gradient_clipping:
            grads = grads.clamp(-options.max_gradient, options.max_gradient)
        # FBGEMM puts other options in their place.
        owners = *self._owners(), options, self.learning_rate_tensor
        if self._update is None or not self._update.is_of(owners):
            self._update = _Update(update, owners, self._arguments(update))
        self._update(grads, rows, starts)

    @functools.cached_property
    def _cpu_update(self) -> Operator | None:
        """The optimizer's step on a CPU; ``None``: on CUDA, or not one of its own."""
        if self.current_device.type != "cpu" or self.counts_by_row:
            return None
        return cpu_update(self.optimizer)

    def _first_numbers(self, count: int) -> Tensor:
        """0, 1, ..., count - 1, on the device of the rows."""
        if self._ascending.shape[0] < count:
            self._ascending = torch.arange(2 * count, device=self._ascending.device)
        return self._ascending.narrow(0, 0, count)

    def _arguments(self, update: Operator) -> list[Any]:
        """The operator's arguments by their names; ``None`` where a call gives them."""
        names = (argument.name for argument in update._schema.arguments)  # noqa: SLF001
        of_tbe = {name: name for name in _OF_TBE} | {"host_weights": "weights_host"}
        arguments: list[Any] = []
        for name in names:
            if name in _OF_OPTIMIZER:
                arguments.append(getattr(self.optimizer_args, name))
            else:
                arguments.append(getattr(self, of_tbe[name]) if name in of_tbe else None)
        return arguments

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
