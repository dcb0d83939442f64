"""MEM-REC: the token rows and the weights that all tables of a group share.

Shape legend: N ids, F features, B samples, S virtual shards of the rank, W weights a shard.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_cafe.config import MemRec
from torchrec_cafe.ops import (
    BitsOfSamples,
    BloomBits,
    bloom_pool,
    bloom_rows,
    bloom_union,
    bloom_weigh,
    bloom_weigh_backward,
)
from torchrec_cafe.ops.bloom import WEIGHTS_PER_ROW
from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.rows import BagRows, RowLookup, TableLayout
from torchrec_cafe.tables.state import ShardedState

# Of the TBE of the weights: it has its own precision, and its output is not used.
_OTHER_PARAMS = frozenset({"output_dtype"})


@dataclass(frozen=True, kw_only=True)
class MemRecLayout:
    """Where a rank's part of the two tables lies.

    Attributes:
        kind: the tables' kind.
        first_shard: first virtual shard of this rank.
        shards_held: virtual shards of this rank, >= 0.
        token_rows_per_shard: rows of a virtual shard of the token table, >= 1.
        weights_per_shard: weights of a virtual shard, a positive multiple of 4.
    """

    kind: MemRec
    first_shard: int
    shards_held: int
    token_rows_per_shard: int
    weights_per_shard: int

    @property
    def token_bits(self) -> BloomBits:
        """Where the token rows of an id lie."""
        return self._bits(self.token_rows_per_shard, self.kind.num_hashes)

    @property
    def weight_bits(self) -> BloomBits:
        """Where the weights of an id lie."""
        return self._bits(self.weights_per_shard, self.kind.num_weight_hashes)

    def _bits(self, per_shard: int, num_hashes: int) -> BloomBits:
        return BloomBits(
            first_shard=self.first_shard,
            shards_held=self.shards_held,
            per_shard=per_shard,
            num_hashes=num_hashes,
        )


def start_of_weights(kind: MemRec, num_features: int) -> float:
    """What weights start at, so that a factor starts at about one, with one id a feature."""
    tokens = num_features if kind.per == "sample" else 1
    return 1 / (tokens * kind.num_weight_hashes)


class TokenWeights(ShardedState):
    """The weights of a rank, in a TBE of their own that trains them as the rows are trained.

    A row of that TBE has four of them, which share the state of a row-wise optimizer.

    Args:
        layout: where the weights lie.
        tables: int64 ``[F, 5]``, as :func:`torchrec_cafe.ops.bloom_weigh` takes them.
        fused_params: the optimizer's arguments, as of the TBE of the rows.
        start: what every weight starts at.
    """

    def __init__(
        self, layout: MemRecLayout, tables: Tensor, fused_params: dict[str, Any], start: float
    ) -> None:
        """Allocate the weights on the device of ``tables``; see the class."""
        self._layout = layout
        self._tables = tables
        self._num_rows = layout.shards_held * layout.weights_per_shard // WEIGHTS_PER_ROW
        self.tbe = RowRangeTBE(
            [self._num_rows],
            WEIGHTS_PER_ROW,
            weights_precision=SparseType.FP32,
            device=tables.device,
            fused_params={k: v for k, v in fused_params.items() if k not in _OTHER_PARAMS},
        )
        with torch.no_grad():
            self.table.fill_(start)

    @property
    def first_shard(self) -> int:
        """Global number of the rank's first virtual shard."""
        return self._layout.first_shard

    @property
    def table(self) -> Tensor:
        """The weights, float32 ``[S, W]``, not copied."""
        return self._by_shard(self.tbe.split_embedding_weights()[0])

    def _by_shard(self, rows: Tensor) -> Tensor:
        """Rows of four weights, or of their optimizer state, as ``[S, ...]``."""
        per_row = rows.shape[1:].numel()
        per_shard = self._layout.weights_per_shard // WEIGHTS_PER_ROW * per_row
        return rows.view(self._layout.shards_held, per_shard)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self.table.numel() * self.table.element_size()

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and their optimizer state, not copied."""
        states = {
            f"weight_table.{name}": self._by_shard(state)
            for of_table in self.tbe.get_optimizer_state()
            for name, state in of_table.items()
            if state.dim() > 0 and len(state) == self._num_rows  # a row's, not the step's
        }
        return {"weight_table": self.table} | states

    def reload(self) -> None:
        """Nothing else depends on the tensors."""

    def of(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """The factor of each id; see :func:`torchrec_cafe.ops.bloom_weigh`."""
        bits = self._layout.weight_bits
        return bloom_weigh(self.table, ids, offsets, self._tables, bits)

    def of_samples(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, BitsOfSamples]:
        """The factor of each sample, float32 ``[B]``, and the weights that it is the sum of."""
        found = bloom_union(ids, offsets, self._tables, self._layout.weight_bits, of="weights")
        weights = self.table.view(-1).index_select(0, found.bits)
        return torch.segment_reduce(weights, "sum", offsets=found.offsets, initial=0.0), found

    def train(self, rows: Tensor, grads: Tensor, learning_rate: float) -> None:
        """Let the optimizer step on the weights that a batch has hit.

        Args:
            rows: int64 ``[U]``, rows of four weights, which may repeat.
            grads: float32 ``[U, 4]``, their gradients.
            learning_rate: of this step.
        """
        if self.tbe.get_learning_rate() != learning_rate:
            self.tbe.set_learning_rate(learning_rate)
        with torch.enable_grad():
            starts = torch.arange(len(rows) + 1, device=rows.device)
            looked_up = self.tbe(indices=rows, offsets=starts)
        looked_up.backward(grads)


class MemRecLookup(RowLookup, ABC):
    """Token rows and weights that ids of all tables share.

    Args:
        tables: the tables, in any order; ``shared_rows`` is the number of virtual shards and
            ``first_row`` the first of this rank.
        layout: where the two tables lie.
        tbe: holds the token rows, which are its last row range and its only one that has rows.
        fused_params: the optimizer's arguments, as TorchRec calls them.
    """

    def __init__(
        self,
        tables: Sequence[TableLayout],
        layout: MemRecLayout,
        tbe: RowRangeTBE,
        fused_params: dict[str, Any],
    ) -> None:
        """Lay out the tables; see the class."""
        super().__init__(tables, tbe.current_device)
        self._layout = layout
        self._tbe = (tbe,)  # hidden from nn.Module: it is a module of the bags
        start = start_of_weights(layout.kind, self.num_features)
        self.weights = TokenWeights(layout, self._tables, fused_params, start)

    @property
    def state(self) -> ShardedState | None:
        """The weights."""
        return self.weights


@final
class MemRecRows(MemRecLookup):
    """An id has token rows and a factor."""

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> BagRows:
        """Find the rows; see the base class."""
        found = bloom_rows(ids, offsets, self._tables, self._layout.token_bits)
        factors = self.weights.of(ids, offsets)
        if weights is not None:
            factors = factors * weights
        given = None if weights is None else weights.detach()
        # FBGEMM could pass the gradient of the factors on, but takes long over it on a CPU.
        return BagRows(
            found.rows,
            found.offsets,
            factors.index_select(0, found.source),
            lambda grad: self._learn(grad, ids, offsets, given),
        )

    def _learn(self, grad: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> None:
        """Train the weights, before FBGEMM changes the rows that they were multiplied with."""
        (tbe,) = self._tbe
        rows, grads = bloom_weigh_backward(
            grad.float().contiguous(),
            tbe.split_embedding_weights()[-1],
            ids,
            offsets,
            self._tables,
            row_bits=self._layout.token_bits,
            weight_bits=self._layout.weight_bits,
            per_sample_weights=weights,
        )
        self.weights.train(rows, grads, tbe.get_learning_rate())

    def infer(
        self, ids: Tensor, offsets: Tensor, weights: Tensor | None, tbe: RowRangeTBE
    ) -> Tensor:
        """Pool the bags; on a CPU in one pass, without FBGEMM; see the base class."""
        if ids.is_cuda:
            return super().infer(ids, offsets, weights, tbe)
        pooled = bloom_pool(
            tbe.split_embedding_weights()[-1],
            self.weights.table,
            ids,
            offsets,
            self._tables,
            row_bits=self._layout.token_bits,
            weight_bits=self._layout.weight_bits,
            per_sample_weights=weights,
        )
        return pooled.to(SparseType.from_int(tbe.output_dtype).as_dtype())


def sample_vectors(summed: Tensor, num_features: int) -> Tensor:
    """The vectors of samples, from what :class:`MemRecSamples` gives, summed over ranks.

    Args:
        summed: ``[B, D + 1]``, token rows and factor.
        num_features: how many features give the vector.

    Returns:
        ``[B, num_features * D]``; differentiable.
    """
    rows, factors = summed.split([summed.shape[1] - 1, 1], 1)
    return (factors * rows).repeat(1, num_features)


@final
class MemRecSamples(MemRecLookup):
    """A sample has token rows and a factor: those of the ids of all its features, each once.

    Rows and factor go out side by side, ``[B, D + 1]``: other ranks have other parts of both, and
    their product is that of the sums.
    """

    @property
    def bags_per_sample(self) -> int:
        """One, of all features."""
        return 1

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> BagRows:
        """Find the rows; see the base class.

        Raises:
            ValueError: if ids are weighted: what a bit of several ids weighs is not defined.
        """
        if weights is not None:
            raise ValueError("MemRec(per='sample') takes no weighted features, got weights")
        found = bloom_union(ids, offsets, self._tables, self._layout.token_bits, of="rows")
        scales, hit = self.weights.of_samples(ids, offsets)
        if torch.is_grad_enabled():
            scales.requires_grad_()
            scales.register_hook(torch.no_grad()(lambda grad: self._learn(grad, hit)))
        return BagRows(found.bits, found.offsets, None, scales=scales)

    def _learn(self, grad: Tensor, hit: BitsOfSamples) -> None:
        """Train the weights: each has the gradient of its samples' factors."""
        (tbe,) = self._tbe
        size = len(hit.bits)
        of_bits = grad.repeat_interleave(hit.offsets.diff(), output_size=size)
        grads = grad.new_zeros((size, WEIGHTS_PER_ROW), dtype=torch.float32)
        grads.scatter_(1, (hit.bits % WEIGHTS_PER_ROW).unsqueeze(1), of_bits.float().unsqueeze(1))
        rows = hit.bits.div(WEIGHTS_PER_ROW, rounding_mode="floor")
        self.weights.train(rows, grads, tbe.get_learning_rate())
