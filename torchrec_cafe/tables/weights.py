"""Weights that scale rows, and how they learn.

Shape legend: S virtual shards of the rank, W weights a shard, D columns.
"""

from __future__ import annotations

from typing import Any, final

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_cafe.ops import Lookups, Remapped, ScaledRows, factor_gradients, key_factors
from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.state import ShardedState
from torchrec_cafe.tables.touched import TouchedRows

# Of the TBE of the weights: it has its own precision, and its output is not used.
_OTHER_PARAMS = frozenset({"output_dtype"})


@final
class WeightTable(ShardedState):
    """The weights of a rank, in a TBE of their own that trains them as the rows are trained.

    Those in a row of that TBE share the state of a row-wise optimizer.

    Args:
        first_shard: global number of the rank's first virtual shard.
        shape: S, and W, a positive multiple of ``per_row``.
        per_row: weights in a row, a multiple of 4.
        start: what every weight starts at.
        device: where they live.
        fused_params: the optimizer's arguments, as of the TBE of the rows.

    Attributes:
        tbe: holds them.
        per_row: as given.
        touched: notes the rows of weights that are trained; ``None``: nobody wants to know.
    """

    def __init__(
        self,
        first_shard: int,
        shape: tuple[int, int],
        *,
        per_row: int,
        start: float,
        device: torch.device,
        fused_params: dict[str, Any],
    ) -> None:
        """Allocate the weights; see the class."""
        self._first_shard = first_shard
        self.shape = shape
        self.per_row = per_row
        self._num_rows = shape[0] * shape[1] // per_row
        # The last row takes the place of those of ids without weights, see factor_gradients.
        self.tbe = RowRangeTBE(
            [self._num_rows, 1],
            per_row,
            weights_precision=SparseType.FP32,
            device=device,
            fused_params={k: v for k, v in fused_params.items() if k not in _OTHER_PARAMS},
        )
        self.touched: TouchedRows | None = None
        self._start = start
        self._views: tuple[Tensor, Tensor] | None = None
        self.reset()

    @property
    def first_shard(self) -> int:
        """Global number of the rank's first virtual shard."""
        return self._first_shard

    @property
    def table(self) -> Tensor:
        """The weights, float32 ``[S, W]``, not copied."""
        rows = self.tbe.physical_tensors()[0]
        if self._views is None or self._views[0] is not rows:
            # Taken in every step, and as slow as all else of a small batch.
            self._views = rows, self._by_shard(rows[: self._num_rows])
        return self._views[1]

    def _by_shard(self, rows: Tensor) -> Tensor:
        """Rows of weights, or of their optimizer state, as ``[S, ...]``."""
        columns = rows.shape[1:].numel()
        return rows.view(self.shape[0], self.shape[1] // self.per_row * columns)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self.table.numel() * self.table.element_size()

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and their optimizer state, not copied."""
        states = {
            f"weight_table.{name}": self._by_shard(state)
            for of_rows in self.tbe.get_optimizer_state()[:1]  # none, if it has no state
            for name, state in of_rows.items()
            if state.dim() > 0 and len(state) == self._num_rows  # a row's, not the step's
        }
        return {"weight_table": self.table} | states

    def reset(self) -> None:
        """Put the weights back to their start, and their optimizer state to 0."""
        with torch.no_grad():
            for tensor in self.state_tensors().values():
                tensor.zero_()
            self.table.fill_(self._start)

    def reload(self) -> None:
        """Nothing else depends on the tensors."""

    def follow(self, tbe: RowRangeTBE) -> None:
        """Step at the learning rate of the rows that the weights scale, whatever becomes of it.

        Args:
            tbe: holds the rows.
        """
        self.tbe.share_learning_rate(tbe)

    def train(self, rows: Tensor, grads: Tensor) -> None:
        """Let the optimizer step on the weights that a batch has hit.

        Args:
            rows: int64 ``[U]``, rows of weights, which may repeat.
            grads: float32 ``[U, per_row]``, their gradients.
        """
        if self.touched is not None:
            self.touched.mark(rows)
        self.tbe.update(rows, grads)


@final
class IdFactors:
    """A learned factor for every id that a pool tracks: the sum of some weights.

    Ids that share a row differ in it. It stays with the id when that is promoted or demoted.

    Args:
        weights: they start at ``1 / num_hashes``, so that factors start at about one.
        num_hashes: weights of an id, in [1, 16].
        tbe: holds the rows that are scaled.
    """

    def __init__(self, weights: WeightTable, num_hashes: int, tbe: RowRangeTBE) -> None:
        """Join them; see the class."""
        weights.follow(tbe)
        self.weights = weights
        self._num_hashes = num_hashes
        self._tbe = tbe

    def of(self, batch: Remapped, source: Tensor | None = None) -> Tensor:
        """The factors of ids, 1 for those that are not tracked.

        Args:
            batch: the ids.
            source: int32 ``[M]``, the id of each row; ``None``: each id once.

        Returns:
            float32 ``[M]``, without ``source`` ``[N]``.
        """
        hashes = self._num_hashes
        return key_factors(self.weights.table, batch.keys, batch.shards, source, num_hashes=hashes)

    def scaled(self, found: Lookups, shards: Tensor) -> ScaledRows:
        """The rows of a batch, as they are before FBGEMM changes them.

        Args:
            found: the rows that were looked up, with their ids.
            shards: int32 ``[N]``, of the batch the ``shards`` or ``cold_shards``: ids with a shard
                below 0 teach nothing.
        """
        table = self._tbe.physical_tensors()[0]
        return ScaledRows(table, found, shards, self.weights.shape[1], self._num_hashes)

    def gradients(
        self, grad: Tensor, scaled: ScaledRows, keys: Tensor, given: Tensor | None, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the gradient of bags means for the weights; see :func:`factor_gradients`.

        Args:
            grad: float32 ``[B * F, D]``, gradient of the pooled bags, contiguous.
            scaled: the rows that were looked up.
            keys: int64 ``[N]``, of the ids.
            given: float32 ``[N]``, further factor of each id; ``None``: all one.
            features: int64 ``[F]``, below 0 those whose ids are not tracked.
        """
        return factor_gradients(
            *(grad, scaled.table, scaled.found, keys, scaled.shards),
            features=features,
            given=given,
            shape=self.weights.shape,
            num_hashes=self._num_hashes,
        )
