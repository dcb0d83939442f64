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
    RwPooledEmbeddingDist,
    RwPooledEmbeddingSharding,
    RwSparseFeaturesDist,
    ShardedEmbeddingTable,
    set_row_boundaries,
)
from torchrec_cafe.distributed.lookup import (
    IdMixer,
    OwnLookup,
    group_of,
)
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.tables import sample_vectors


class CompressedRwSparseFeaturesDist(RwSparseFeaturesDist):
    """Mixes the ids, then sends each to the rank that owns its virtual shard.

    Args:
        pg: process group of the sharding.
        tables: the tables, in the order of the features of a batch.
        device: where the ids are.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        tables: list[ShardedEmbeddingTable],
        device: torch.device | None = None,
    ) -> None:
        """Set the boundaries; see the class."""
        sizes: list[int] = []
        boundaries: list[torch.Tensor] = []
        for table in tables:
            group = group_of(table)
            for _ in range(table.num_features()):
                compressed = group.table(table.name)
                bounds = group.id_bounds(compressed, dist.get_world_size(pg))
                sizes.append(compressed.num_ids)
                boundaries.append(torch.tensor(bounds, device=device))
        super().__init__(pg, len(sizes), sizes, device=device)
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
        groups: the groups of the lookup, in order, each with its number of features and its dim.
        qcomm_codecs_registry: as TorchRec's.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        groups: list[tuple[CompressedGroup, int, int]],
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        """Note the columns of each group; see the class."""
        dims = [dim for _, num_features, dim in groups for _ in range(num_features)]
        super().__init__(pg, dims, qcomm_codecs_registry)
        self._groups = groups

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """Reduce and scatter; see the class."""
        awaitable = super().forward(local_embs, sharding_ctx)
        if any(group.is_per_sample for group, _, _ in self._groups):
            awaitable.callbacks.append(self._vectors)
        return awaitable

    def _vectors(self, summed: torch.Tensor) -> torch.Tensor:
        """Turn token rows and factor of a sample, ``D + 1`` columns, into ``F`` times ``D``."""
        widths = [
            dim + 1 if group.is_per_sample else num_features * dim
            for group, num_features, dim in self._groups
        ]
        parts = list(summed.split(widths, 1))
        for number, (group, num_features, _) in enumerate(self._groups):
            if group.is_per_sample:
                parts[number] = sample_vectors(parts[number], num_features)
        return torch.cat(parts, 1)


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
        groups = [
            (config.fused_params[GROUP_PARAM], config.num_features(), config.embedding_dims()[0])
            for config in self._grouped_embedding_configs
            if config.fused_params is not None
        ]
        return CompressedRwPooledEmbeddingDist(self._pg, groups, self.qcomm_codecs_registry)
