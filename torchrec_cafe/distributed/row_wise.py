"""Row-wise sharding of compressed tables: input dist by mixed ids, lookup by our kernel."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseEmbeddingLookup,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.types import Awaitable, QuantizedCommCodecs, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    GroupedEmbeddingConfig,
    GroupedPooledEmbeddingsLookup,
    RwPooledEmbeddingDist,
    RwPooledEmbeddingSharding,
    RwSparseFeaturesDist,
    set_row_boundaries,
)
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.ops import mix_ids

logger = logging.getLogger(__name__)


class CompressedRwSparseFeaturesDist(RwSparseFeaturesDist):
    """Mixes the ids, then sends each to the rank that owns its virtual shard.

    Args:
        pg: process group of the sharding.
        names: name of each feature's table, for messages.
        num_embeddings: ids of each feature's table.
        id_bounds: for each feature, first mixed id of each rank and the number of ids.
        bounds_check_modes: what to do about ids out of range, for each feature, as FBGEMM's
            ``bounds_check_mode`` says; ``NONE`` is taken as ``IGNORE``.
        device: where the ids are.
    """

    _num_embeddings: torch.Tensor

    def __init__(
        self,
        pg: dist.ProcessGroup,
        names: list[str],
        num_embeddings: list[int],
        id_bounds: list[list[int]],
        bounds_check_modes: list[BoundsCheckMode],
        device: torch.device | None = None,
    ) -> None:
        """Set the boundaries; see the class."""
        super().__init__(pg, len(names), num_embeddings, device=device)
        set_row_boundaries(self, [torch.tensor(b, device=device) for b in id_bounds])
        self._names = names
        self._modes = bounds_check_modes
        self._check = any(
            mode in (BoundsCheckMode.FATAL, BoundsCheckMode.WARNING) for mode in bounds_check_modes
        )
        sizes = torch.tensor(num_embeddings, dtype=torch.int64, device=device)
        self.register_buffer("_num_embeddings", sizes, persistent=False)
        self._warned: set[str] = set()

    def forward(
        self, sparse_features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Mix and distribute; see the class.

        Raises:
            ValueError: for an id out of range, under ``BoundsCheckMode.FATAL``.
        """
        if sparse_features.variable_stride_per_key():
            raise ValueError(
                f"tables {', '.join(sorted(set(self._names)))}: compressed tables need the same "
                "batch size for every feature, got a KeyedJaggedTensor with variable stride"
            )
        return super().forward(self._mix(sparse_features))

    def _mix(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        values, stride = features.values(), features.stride()
        if stride == 0:
            return features
        out_of_range = torch.zeros_like(self._num_embeddings)
        mixed = mix_ids(
            values.long().contiguous(),
            features.offsets()[::stride].long().contiguous(),
            self._num_embeddings,
            out_of_range,
        )
        if self._check:
            self._report(out_of_range)
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=mixed.to(values.dtype),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
            offsets=features.offsets(),
            stride=stride,
            length_per_key=features.length_per_key_or_none(),
            offset_per_key=features.offset_per_key_or_none(),
        )

    def _report(self, out_of_range: torch.Tensor) -> None:
        if not out_of_range.any():
            return
        for name, mode, count in zip(self._names, self._modes, out_of_range.tolist(), strict=True):
            if count == 0:
                continue
            if mode == BoundsCheckMode.FATAL:
                raise ValueError(
                    f"table {name!r}: ids must be in [0, num_embeddings), got {count} ids out of "
                    "range in one batch; fix the ids or use BoundsCheckMode.WARNING"
                )
            if mode == BoundsCheckMode.WARNING and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "table %r: %d ids of a batch are out of range and taken as id 0 "
                    "(said once per table)",
                    name,
                    count,
                )


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
        for number, (group, num_features, dim) in enumerate(self._groups):
            if group.is_per_sample:
                rows, factor = parts[number].split([dim, 1], 1)
                parts[number] = (factor * rows).repeat(1, num_features)
        return torch.cat(parts, 1)


class CompressedGroupedPooledEmbeddingsLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup with our kernel for compressed groups."""

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, device: Any, pg: Any, *args: Any
    ) -> Any:
        if GROUP_PARAM in (config.fused_params or {}):
            sharding_type = args[0] if args else ShardingType.ROW_WISE
            return CompressedEmbeddingBag(config, pg, device, sharding_type)
        return super()._create_embedding_kernel(config, device, pg, *args)


class CompressedRwPooledEmbeddingSharding(RwPooledEmbeddingSharding):
    """Row-wise sharding of the compressed tables of a module."""

    def create_input_dist(
        self, device: torch.device | None = None
    ) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Input dist by mixed ids."""
        names: list[str] = []
        num_embeddings: list[int] = []
        id_bounds: list[list[int]] = []
        modes: list[BoundsCheckMode] = []
        for table in self.embedding_tables():
            fused_params = table.fused_params or {}
            group: CompressedGroup = fused_params[GROUP_PARAM]
            for _ in range(table.num_features()):
                compressed = group.table(table.name)
                names.append(table.name)
                num_embeddings.append(compressed.num_ids)
                id_bounds.append(group.id_bounds(compressed, self._world_size))
                modes.append(fused_params.get("bounds_check_mode", BoundsCheckMode.WARNING))
        assert self._pg is not None
        return CompressedRwSparseFeaturesDist(
            self._pg, names, num_embeddings, id_bounds, modes, device or self._device
        )

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: Any = None,
    ) -> BaseEmbeddingLookup[Any, Any]:
        """Lookup with our kernel."""
        return CompressedGroupedPooledEmbeddingsLookup(
            grouped_configs=self._grouped_embedding_configs,
            pg=self._pg,
            device=device or self._device,
            feature_processor=feature_processor,
            sharding_type=ShardingType.ROW_WISE,
            env=self._env,
        )

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
