"""MEM-REC tables as parameters of autograd, for replicas whose gradients are averaged.

Shape legend: N ids, F features, B samples, D columns, R token rows, S virtual shards, W weights a
shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from torchrec_cafe.ops import bloom_pool, bloom_rows, bloom_union, bloom_weigh, bloom_weigh_backward
from torchrec_cafe.ops.bloom import WEIGHTS_PER_ROW
from torchrec_cafe.tables.mem_rec import (
    MemRecLayout,
    sample_vectors,
    start_of_weights,
    sum_weights,
)
from torchrec_cafe.tables.rows import TableLayout, table_columns


class _WithWeights(torch.autograd.Function):
    """Lets the gradient of pooled bags reach the weights that they were scaled with."""

    @staticmethod
    def forward(
        ctx: Any, pooled: Tensor, _weights: Tensor, gradient: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.gradient = gradient
        return pooled.view_as(pooled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, ctx.gradient(grad), None


class DenseMemRecBags(nn.Module):
    """Embedding bags of MEM-REC tables whose gradients are dense, pooled by sum.

    Args:
        tables: the tables; ``shared_rows`` is the number of virtual shards.
        layout: of the two tables, which are both here in full.
        embedding_dim: columns, a multiple of 4.
        precision: of the token rows, FP32 or FP16.
        device: where the rows live.

    Attributes:
        tbe: FBGEMM's, with one parameter, the token rows.
        weights: the weights, float32 ``[S, W]``.

    Note:
        On a CPU the gradients are deterministic; on CUDA as FBGEMM's and ``index_add_`` are.
    """

    _tables: Tensor

    def __init__(
        self,
        tables: Sequence[TableLayout],
        layout: MemRecLayout,
        embedding_dim: int,
        *,
        precision: SparseType,
        device: torch.device,
    ) -> None:
        """Allocate both tables; see the class."""
        super().__init__()
        self._layout = layout
        self.register_buffer("_tables", table_columns(tables, device), persistent=False)
        rows = layout.shards_held * layout.token_rows_per_shard
        self.tbe = DenseTableBatchedEmbeddingBagsCodegen(
            [(rows, embedding_dim)],
            weights_precision=precision,
            use_cpu=device.type == "cpu",
        )
        start = start_of_weights(layout.kind, len(self._tables))
        shape = layout.shards_held, layout.weights_per_shard
        self.weights = nn.Parameter(torch.full(shape, start, device=device))

    @property
    def token_rows(self) -> Tensor:
        """The token rows, ``[R, D]``, not copied."""
        return self.tbe.split_embedding_weights()[0]

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Look up and pool.

        Args:
            ids: int64 ``[N]``, mixed ids, feature-major.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            weights: float32 ``[N]``, factor of each id's rows in its bag's sum.

        Returns:
            ``[B, F * D]``, float32.

        Raises:
            ValueError: if ids are weighted that have a vector per sample.
        """
        if self._layout.kind.per == "sample":
            return self._of_samples(ids, offsets, weights)
        if not torch.is_grad_enabled() and not ids.is_cuda:
            return bloom_pool(
                self.token_rows,
                self.weights,
                ids,
                offsets,
                self._tables,
                **self._layout.both_bits,
                per_sample_weights=weights,
            )
        found = bloom_rows(ids, offsets, self._tables, self._layout.token_bits)
        bits = self._layout.weight_bits
        factors = bloom_weigh(self.weights.detach(), ids, offsets, self._tables, bits)
        if weights is not None:
            factors = factors * weights
        scales = factors.index_select(0, found.source)
        unasked = None if scales.requires_grad else torch.zeros(1, dtype=torch.int32).to(ids.device)
        pooled = self.tbe(
            found.rows, found.offsets, per_sample_weights=scales, feature_requires_grad=unasked
        )
        given = None if weights is None else weights.detach()
        pooled = _WithWeights.apply(
            pooled, self.weights, lambda grad: self._gradient(grad, ids, offsets, given)
        )
        return pooled.view(-1, len(self._tables) * pooled.shape[1])

    def _gradient(
        self, grad: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        """The gradient of the weights, ``[S, W]``, from that of the pooled bags."""
        rows, grads = bloom_weigh_backward(
            grad.float().contiguous(),
            self.token_rows.detach(),
            ids,
            offsets,
            self._tables,
            **self._layout.both_bits,
            per_sample_weights=weights,
        )
        total = torch.zeros_like(self.weights)
        total.view(-1, WEIGHTS_PER_ROW).index_add_(0, rows, grads)
        return total

    def _of_samples(self, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None:
            raise ValueError("MemRec(per='sample') takes no weighted features, got weights")
        layout = self._layout
        rows = bloom_union(ids, offsets, self._tables, layout.token_bits, of="rows")
        hit = bloom_union(ids, offsets, self._tables, layout.weight_bits, of="weights")
        factors = sum_weights(self.weights, hit)
        pooled = self.tbe(rows.bits, rows.offsets)
        return sample_vectors(torch.cat([pooled, factors.unsqueeze(1)], 1), len(self._tables))
