"""Row-wise sharding of compressed tables: every rank has the rows of a range of mixed ids."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.types import Awaitable, QuantizedCommCodecs, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    GroupedEmbeddingConfig,
    RwPooledEmbeddingDist,
    RwPooledEmbeddingSharding,
    RwSequenceEmbeddingSharding,
    RwSparseFeaturesDist,
    ShardedEmbeddingTable,
    set_row_boundaries,
)
from torchrec_cafe.distributed.lookup import (
    IdMixer,
    OwnLookup,
    OwnSequenceLookup,
    id_boundaries,
)
from torchrec_cafe.distributed.pooled_columns import GroupColumns


class CompressedRwSparseFeaturesDist(RwSparseFeaturesDist):
    """Mixes the ids, then sends each to the rank that owns its virtual shard.

    Args:
        pg: process group of the sharding.
        tables: the tables, in the order of the features of a batch.
        device: where the ids are.
        is_sequence: whether to note where each id came from, as sequences need it.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        tables: list[ShardedEmbeddingTable],
        device: torch.device | None = None,
        *,
        is_sequence: bool = False,
    ) -> None:
        """Set the boundaries; see the class."""
        sizes, boundaries = id_boundaries(tables, dist.get_world_size(pg), device)
        super().__init__(pg, len(sizes), sizes, device=device, is_sequence=is_sequence)
        set_row_boundaries(self, boundaries)
        self._mixer = IdMixer(tables, device)

    def forward(
        self, sparse_features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Mix and distribute; see the class.

        Raises:
            ValueError: as :class:`IdMixer`.
        """
        return super().forward(self._mixer(sparse_features))


class CompressedRwPooledEmbeddingDist(RwPooledEmbeddingDist):
    """Adds up what the ranks have looked up, and makes vectors of features of it.

    Args:
        pg: process group of the sharding.
        configs: the groups of the lookup, in order.
        qcomm_codecs_registry: as TorchRec's.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        configs: list[GroupedEmbeddingConfig],
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        """Note the columns of each group; see the class."""
        dims = [dim for config in configs for dim in config.embedding_dims()]
        super().__init__(pg, dims, qcomm_codecs_registry)
        self._columns = GroupColumns(configs)

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Reduce and scatter; see the class."""
        return self._columns.finish(super().forward(local_embs, sharding_ctx))


class CompressedRwPooledEmbeddingSharding(OwnLookup, RwPooledEmbeddingSharding):
    """Row-wise sharding of the compressed tables of a module."""

    _sharding_type = ShardingType.ROW_WISE

    def create_input_dist(
        self, device: torch.device | None = None
    ) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Input dist by mixed ids."""
        assert self._pg is not None
        tables = self.embedding_tables()
        return CompressedRwSparseFeaturesDist(self._pg, tables, device or self._device)

    def create_output_dist(
        self, device: torch.device | None = None
    ) -> BaseEmbeddingDist[EmbeddingShardingContext, torch.Tensor, torch.Tensor]:
        """Output dist that knows vectors of samples."""
        assert self._pg is not None
        return CompressedRwPooledEmbeddingDist(
            self._pg, self._grouped_embedding_configs, self.qcomm_codecs_registry
        )


class CompressedRwSequenceEmbeddingSharding(OwnSequenceLookup, RwSequenceEmbeddingSharding):
    """Row-wise sharding of the compressed tables of a module of sequences."""

    def create_input_dist(
        self, device: torch.device | None = None
    ) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Input dist by mixed ids."""
        assert self._pg is not None
        return CompressedRwSparseFeaturesDist(
            self._pg, self.embedding_tables(), device or self._device, is_sequence=True
        )
