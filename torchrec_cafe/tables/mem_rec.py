"""MEM-REC: the token rows and the weights that all tables of a group share.

Shape legend: N ids, F features, B samples, S virtual shards of the rank, W weights a shard.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_cafe.config import MemRec
from torchrec_cafe.ops import (
    BitsOfSamples,
    BloomBits,
    Lookups,
    bloom_pool,
    bloom_rows,
    bloom_union,
    bloom_weigh,
    bloom_weigh_backward,
)
from torchrec_cafe.ops.bloom import WEIGHTS_PER_ROW
from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.rows import (
    BagRows,
    RowLookup,
    TableLayout,
    by_id,
    feature_starts,
    on_gradient,
)
from torchrec_cafe.tables.state import ShardedState
from torchrec_cafe.tables.weights import WeightTable


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

    @property
    def both_bits(self) -> dict[str, BloomBits]:
        """Both, as the operators on rows and weights take them."""
        return {"row_bits": self.token_bits, "weight_bits": self.weight_bits}

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
        self.weights = WeightTable(
            layout.first_shard,
            (layout.shards_held, layout.weights_per_shard),
            per_row=WEIGHTS_PER_ROW,
            start=start_of_weights(layout.kind, self.num_features),
            device=tbe.current_device,
            fused_params=fused_params,
        )
        self.weights.follow(tbe)

    @property
    def state(self) -> ShardedState | None:
        """The weights."""
        return self.weights


@final
class MemRecRows(MemRecLookup):
    """An id has token rows and a factor."""

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> BagRows:
        """Find the rows; see the base class."""
        found, factors = self._found(ids, offsets)
        if weights is not None:
            factors = factors * weights
        given = None if weights is None else weights.detach()
        bags = _Bags(ids, offsets, self._tables)
        # FBGEMM could pass the gradient of the factors on, but takes long over it on a CPU.
        return BagRows(
            found.rows,
            found.offsets,
            factors.index_select(0, found.source),
            lambda grad: self._learn(grad, bags, given),
        )

    def unpooled(self, ids: Tensor, offsets: Tensor) -> BagRows:
        """Find the rows of each id; see the base class."""
        starts = feature_starts(offsets, self.num_features)
        found, factors = self._found(ids, starts)
        found = by_id(found, len(ids))
        return BagRows(
            found.rows,
            found.offsets,
            factors.index_select(0, found.source),
            lambda grad: self._learn(grad, self._bags_of_ids(ids, starts), None),
        )

    def _found(self, ids: Tensor, offsets: Tensor) -> tuple[Lookups, Tensor]:
        """The token rows of bags, and the factor of each id."""
        found = bloom_rows(ids, offsets, self._tables, self._layout.token_bits)
        bits = self._layout.weight_bits
        return found, bloom_weigh(self.weights.table, ids, offsets, self._tables, bits)

    def _bags_of_ids(self, ids: Tensor, starts: Tensor) -> _Bags:
        """One sample, in which every id is a feature."""
        size = len(ids)
        tables = self._tables.repeat_interleave(starts.diff(), dim=0, output_size=size)
        return _Bags(ids, torch.arange(size + 1, device=ids.device), tables)

    def _learn(self, grad: Tensor, bags: _Bags, weights: Tensor | None) -> None:
        """Train the weights, before FBGEMM changes the rows that they were multiplied with."""
        if len(bags.tables) == 0:  # a rank may have none of the ids
            return
        (tbe,) = self._tbe
        rows, grads = bloom_weigh_backward(
            grad,
            tbe.split_embedding_weights()[-1],
            *bags,
            **self._layout.both_bits,
            per_sample_weights=weights,
        )
        self.weights.train(rows, grads)

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
            **self._layout.both_bits,
            per_sample_weights=weights,
        )
        return pooled.to(SparseType.from_int(tbe.output_dtype).as_dtype())


class _Bags(NamedTuple):
    """Bags of ids, and the table of each feature, as the operators take them."""

    ids: Tensor
    offsets: Tensor
    tables: Tensor


def sum_weights(weights: Tensor, hit: BitsOfSamples) -> Tensor:
    """The factor of each sample, float32 ``[B]``; differentiable.

    Args:
        weights: float32 ``[S, W]``.
        hit: the weights of each sample.
    """
    picked = weights.view(-1).index_select(0, hit.bits)
    return torch.segment_reduce(picked, "sum", offsets=hit.offsets, initial=0.0)


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
        hit = bloom_union(ids, offsets, self._tables, self._layout.weight_bits, of="weights")
        scales = sum_weights(self.weights.table, hit)
        if torch.is_grad_enabled():
            scales.requires_grad_()
            on_gradient(scales, lambda grad: self._learn(grad, hit))
        return BagRows(found.bits, found.offsets, None, scales=scales)

    def unpooled(self, ids: Tensor, offsets: Tensor) -> BagRows:
        """Refuse; see the base class.

        Raises:
            ValueError: always.
        """
        raise ValueError("MemRec(per='sample') has no vectors of ids; use MemRec(per='token')")

    def _learn(self, grad: Tensor, hit: BitsOfSamples) -> None:
        """Train the weights: each has the gradient of its samples' factors."""
        size = len(hit.bits)
        of_bits = grad.repeat_interleave(hit.offsets.diff(), output_size=size)
        grads = grad.new_zeros((size, WEIGHTS_PER_ROW), dtype=torch.float32)
        grads.scatter_(1, (hit.bits % WEIGHTS_PER_ROW).unsqueeze(1), of_bits.float().unsqueeze(1))
        rows = hit.bits.div(WEIGHTS_PER_ROW, rounding_mode="floor")
        self.weights.train(rows, grads)
