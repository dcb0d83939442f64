"""Table-row-wise sharding of compressed tables: a pool lies on one host, spread over its ranks."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.types import Awaitable, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
    TwRwPooledEmbeddingDist,
    TwRwPooledEmbeddingSharding,
    TwRwSparseFeaturesDist,
    cut_by_boundaries,
    staggered,
)
from torchrec_cafe.distributed.lookup import IdMixer, OwnLookup, id_boundaries
from torchrec_cafe.distributed.pooled_columns import GroupColumns


class CompressedTwRwSparseFeaturesDist(TwRwSparseFeaturesDist):
    """Mixes the ids, then sends each to the rank of its table's host that owns its virtual shard.

    Args:
        pg: process group of the sharding.
        local_size: ranks of a host.
        tables: the tables of all hosts, in the order of the features of a batch.
        features_per_rank: how many of the features go to each rank.
        device: where the ids are.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        local_size: int,
        tables: list[ShardedEmbeddingTable],
        features_per_rank: list[int],
        device: torch.device | None = None,
    ) -> None:
        """Set the boundaries; see the class."""
        sizes, self._boundaries = id_boundaries(tables, local_size, device)
        super().__init__(pg, local_size, features_per_rank, sizes, device=device)
        self._mixer = IdMixer(tables, device)

    def forward(
        self, sparse_features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Mix and distribute; see the class.

        Raises:
            ValueError: as :class:`IdMixer`.
        """
        mixed = self._mixer(sparse_features)
        return staggered(self, cut_by_boundaries(self, mixed, self._boundaries))


class CompressedTwRwPooledEmbeddingDist(TwRwPooledEmbeddingDist):
    """Adds up what a host's ranks have looked up, and makes vectors of features of it.

    Args:
        columns: what the columns are, host by host.
        args: TorchRec's arguments; the dims are those of ``columns``.
    """

    def __init__(self, columns: GroupColumns, *args: object) -> None:
        """Note the columns; see the class."""
        super().__init__(*args)  # pyright: ignore[reportArgumentType]
        self._columns = columns

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Reduce within the host, then exchange; see the class."""
        awaitable = super().forward(local_embs, sharding_ctx)
        return self._columns.finish(awaitable)


class CompressedTwRwPooledEmbeddingSharding(OwnLookup, TwRwPooledEmbeddingSharding):
    """Table-row-wise sharding of the compressed tables of a module."""

    _sharding_type = ShardingType.TABLE_ROW_WISE

    def local_configs(self) -> list[GroupedEmbeddingConfig]:
        """See :meth:`OwnLookup.local_configs`."""
        return self._grouped_embedding_configs_per_rank[self._rank]

    def create_input_dist(
        self, device: torch.device | None = None
    ) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Input dist by mixed ids."""
        assert self._pg is not None
        assert self._intra_pg is not None
        tables = [
            table
            for configs in self._grouped_embedding_configs_per_node
            for config in configs
            for table in config.embedding_tables
        ]
        return CompressedTwRwSparseFeaturesDist(
            self._pg,
            self._intra_pg.size(),
            tables,
            self._features_per_rank(self._grouped_embedding_configs_per_rank),
            device or self._device,
        )

    def create_output_dist(
        self, device: torch.device | None = None
    ) -> BaseEmbeddingDist[EmbeddingShardingContext, torch.Tensor, torch.Tensor]:
        """Output dist that knows vectors of samples."""
        hosts = [GroupColumns(configs) for configs in self._grouped_embedding_configs_per_node]
        return CompressedTwRwPooledEmbeddingDist(
            GroupColumns(
                [c for configs in self._grouped_embedding_configs_per_node for c in configs]
            ),
            self._rank,
            cast(dist.ProcessGroup, self._cross_pg),
            cast(dist.ProcessGroup, self._intra_pg),
            [columns.width for columns in hosts],
            self._emb_dim_per_node_per_feature(),
            device or self._device,
            self.qcomm_codecs_registry,
        )
