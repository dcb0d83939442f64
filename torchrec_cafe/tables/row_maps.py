"""From ids to rows where nothing is learned, in modules that TorchScript compiles.

Shape legend: N ids, F features, B samples, M rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from torchrec_cafe.ops import PoolRows
from torchrec_cafe.tables.mem_rec import MemRecLayout
from torchrec_cafe.tables.rows import TableLayout, table_columns


class RowMap(nn.Module, ABC):
    """Finds the rows of ids of tables that are here in full, without any wrapper of an operator.

    All it knows is in buffers, so that it can be saved, scripted and moved. The rows of a bag are
    those that the same ids train in :class:`torchrec_cafe.tables.RowLookup`.

    Args:
        tables: the tables, in the order of their row ranges; one feature after the other.
        features: positions in ``tables``, the table of each feature.
    """

    tables: Tensor
    num_ids: Tensor
    feature_numbers: Tensor

    def __init__(self, tables: Sequence[TableLayout], features: Sequence[int]) -> None:
        """Note the tables; see the class."""
        super().__init__()
        columns = table_columns(tables, torch.device("cpu"))
        chosen = columns.index_select(0, torch.tensor(features, dtype=torch.int64))
        self.register_buffer("tables", chosen)
        self.register_buffer("num_ids", chosen[:, 0].contiguous())
        self.register_buffer("feature_numbers", torch.arange(len(features) + 1))

    @property
    @abstractmethod
    def has_factors(self) -> bool:
        """Whether rows are scaled."""

    def mixed(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """The mixed ids; those out of range are taken as id 0.

        Args:
            ids: int64 ``[N]``, feature-major.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
        """
        batch_size = (offsets.numel() - 1) // (self.feature_numbers.numel() - 1)
        feature_offsets = offsets.index_select(0, self.feature_numbers * batch_size)
        return torch.ops.torchrec_cafe.mix_ids(
            ids, feature_offsets, self.num_ids, torch.zeros_like(self.num_ids)
        )

    @abstractmethod
    def forward(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the rows.

        Args:
            ids: int64 ``[N]``, ids of the uncompressed tables, feature-major.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.

        Returns:
            int64 ``[M]``, physical rows, sample-major; int64 ``[B * F + 1]``, where each bag starts
            in them; int32 ``[M]``, position in ``ids`` that each came from; and float32 ``[N]``,
            what the rows of each id are multiplied by, or ``[0]``: nothing.
        """


@final
class SharedRowMap(RowMap):
    """Rows of ``Cafe`` and ``Hash`` tables; see :class:`RowMap`.

    Args:
        tables: as of the base class.
        features: as of the base class.
        pool: where hot and second rows lie.
        buckets: int64 ``[S, W, 8]`` of the sketch, all virtual shards; ``[0, 0, 8]`` without.
        weights: float32 ``[S, weights a shard]`` of factors; ``[0, 0]``: no factors.
        num_hashes: weights of a factor.
    """

    buckets: Tensor
    weights: Tensor

    def __init__(  # noqa: PLR0913  all it knows
        self,
        tables: Sequence[TableLayout],
        features: Sequence[int],
        *,
        pool: PoolRows,
        buckets: Tensor,
        weights: Tensor,
        num_hashes: int,
    ) -> None:
        """Note where rows lie; see the class."""
        super().__init__(tables, features)
        self.register_buffer("buckets", buckets)
        self.register_buffer("weights", weights)
        self.num_shards = buckets.shape[0]
        self.hot_rows_per_shard = pool.hot_rows_per_shard
        self.rows_per_shard = pool.rows_per_shard
        self.offset = pool.offset
        self.num_hashes = num_hashes
        self.with_second = pool.second_rows_per_shard > 0
        self.with_factors = weights.numel() > 0

    @property
    def has_factors(self) -> bool:
        """Whether rows are scaled."""
        return self.with_factors

    def forward(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the rows; see the base class."""
        rows, starts, source, keys, shards, second, _ = torch.ops.torchrec_cafe.remap(
            self.mixed(ids, offsets),
            offsets,
            self.tables,
            self.buckets,
            0,
            self.num_shards,
            self.hot_rows_per_shard,
            self.rows_per_shard,
            self.offset,
            True,  # noqa: FBT003  the operator's schema
        )
        if self.with_second:
            rows, starts, source = torch.ops.torchrec_cafe.add_second_rows(
                rows, starts, source, second, self.offset
            )
        factors = self.weights.new_empty((0,))
        if self.with_factors:
            factors = torch.ops.torchrec_cafe.key_factors(
                self.weights, keys, shards, self.num_hashes
            )
        return rows, starts, source, factors


@final
class QuotientRemainderRowMap(RowMap):
    """Rows of ``QuotientRemainder`` tables; see :class:`RowMap`."""

    @property
    def has_factors(self) -> bool:
        """Never."""
        return False

    def forward(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the rows; see the base class."""
        rows, starts, source = torch.ops.torchrec_cafe.quotient_remainder(
            self.mixed(ids, offsets), offsets, self.tables
        )
        return rows, starts, source, torch.empty((0,), device=ids.device)


@final
class MemRecRowMap(RowMap):
    """Token rows of ``MemRec`` tables, one vector a token; see :class:`RowMap`.

    Args:
        tables: as of the base class.
        features: as of the base class.
        layout: of both tables, which are here in full.
        weights: float32 ``[S, weights a shard]``.
    """

    weights: Tensor

    def __init__(
        self,
        tables: Sequence[TableLayout],
        features: Sequence[int],
        *,
        layout: MemRecLayout,
        weights: Tensor,
    ) -> None:
        """Note where rows lie; see the class."""
        super().__init__(tables, features)
        self.register_buffer("weights", weights)
        self.num_shards = layout.shards_held
        self.rows_per_shard = layout.token_rows_per_shard
        self.num_hashes = layout.kind.num_hashes
        self.num_weight_hashes = layout.kind.num_weight_hashes

    @property
    def has_factors(self) -> bool:
        """Always."""
        return True

    def forward(self, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the rows; see the base class."""
        mixed = self.mixed(ids, offsets)
        rows, starts, source = torch.ops.torchrec_cafe.bloom_rows(
            mixed, offsets, self.tables, 0, self.num_shards, self.rows_per_shard, self.num_hashes
        )
        factors = torch.ops.torchrec_cafe.bloom_weigh(
            self.weights, mixed, offsets, self.tables, 0, self.num_weight_hashes
        )
        return rows, starts, source, factors
