"""Table-wise sharding of compressed tables: all tables of a pool lie on one rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import BaseSparseFeaturesDist
from torchrec.distributed.types import Awaitable, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    ShardedEmbeddingTable,
    TwPooledEmbeddingSharding,
    TwSequenceEmbeddingSharding,
    TwSparseFeaturesDist,
)
from torchrec_cafe.distributed.lookup import IdMixer, OwnLookup, OwnSequenceLookup


class CompressedTwSparseFeaturesDist(TwSparseFeaturesDist):
    """Mixes the ids, then sends each feature to the rank of its table.

    Args:
        pg: process group of the sharding.
        tables: the tables of all ranks, in the order of the features of a batch.
        features_per_rank: how many of the features go to each rank.
        device: where the ids are.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        tables: list[ShardedEmbeddingTable],
        features_per_rank: list[int],
        device: torch.device | None = None,
    ) -> None:
        """Note the tables; see the class."""
        super().__init__(pg, features_per_rank)
        self._mixer = IdMixer(tables, device)

    def forward(
        self, sparse_features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Mix and distribute; see the class.

        Raises:
            ValueError: as :class:`IdMixer`.
        """
        return super().forward(self._mixer(sparse_features))


class _OwnInputDist:
    """An input dist that mixes ids, of pooled bags and of sequences."""

    _pg: dist.ProcessGroup | None
    _device: torch.device | None
    embedding_tables: Callable[[], list[ShardedEmbeddingTable]]
    features_per_rank: Callable[[], list[int]]

    def create_input_dist(
        self, device: torch.device | None = None
    ) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Input dist by mixed ids."""
        assert self._pg is not None
        return CompressedTwSparseFeaturesDist(
            self._pg, self.embedding_tables(), self.features_per_rank(), device or self._device
        )


class CompressedTwPooledEmbeddingSharding(_OwnInputDist, OwnLookup, TwPooledEmbeddingSharding):
    """Table-wise sharding of the compressed tables of a module."""

    _sharding_type = ShardingType.TABLE_WISE


class CompressedTwSequenceEmbeddingSharding(
    _OwnInputDist, OwnSequenceLookup, TwSequenceEmbeddingSharding
):
    """Table-wise sharding of the compressed tables of a module of sequences."""
