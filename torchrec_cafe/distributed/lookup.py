"""What every sharding of compressed tables has: ids mixed and checked, lookups by our kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_sharding import BaseEmbeddingLookup
from torchrec.distributed.types import ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    GroupedEmbeddingConfig,
    GroupedEmbeddingsLookup,
    GroupedPooledEmbeddingsLookup,
    ShardedEmbeddingTable,
)
from torchrec_cafe.distributed.bounds import BoundsReport
from torchrec_cafe.distributed.kernel import CompressedEmbedding, CompressedEmbeddingBag
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.ops import mix_ids


def group_of(table: ShardedEmbeddingTable) -> CompressedGroup:
    """The group of a table that TorchRec has sharded."""
    assert table.fused_params is not None
    return table.fused_params[GROUP_PARAM]


def id_boundaries(
    tables: Sequence[ShardedEmbeddingTable], num_ranks: int, device: torch.device | None
) -> tuple[list[int], list[torch.Tensor]]:
    """Where the mixed ids of each feature are cut between the ranks that have its table.

    Args:
        tables: the tables, in the order of the features of a batch.
        num_ranks: how many have a part of each table.
        device: where the ids are.

    Returns:
        Number of ids, and int64 ``[num_ranks + 1]`` boundaries, of each feature.
    """
    sizes: list[int] = []
    boundaries: list[torch.Tensor] = []
    for table in tables:
        group = group_of(table)
        for _ in range(table.num_features()):  # none of a pool
            compressed = group.table(table.name)
            sizes.append(compressed.num_ids)
            bounds = group.id_bounds(compressed, num_ranks)
            boundaries.append(torch.tensor(bounds, device=device))
    return sizes, boundaries


class IdMixer(nn.Module):
    """Mixes the ids of a batch, and reports those out of range.

    Args:
        tables: the tables, in the order of the features of a batch, as for :class:`BoundsReport`.
        device: where the ids are.
    """

    _num_embeddings: torch.Tensor

    def __init__(
        self, tables: Sequence[ShardedEmbeddingTable], device: torch.device | None = None
    ) -> None:
        """Note the tables; see the class."""
        super().__init__()
        self._report = BoundsReport(tables)
        sizes = [
            group_of(table).table(table.name).num_ids
            for table in tables
            for _ in range(table.num_features())
        ]
        self._are_wide = max(sizes, default=0) > 2**31  # mixed ids need not fit where ids do
        self.register_buffer(
            "_num_embeddings",
            torch.tensor(sizes, dtype=torch.int64, device=device),
            persistent=False,
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Mix; see the class.

        Args:
            features: ids of the uncompressed tables.

        Returns:
            The same bags of mixed ids, of the same dtype unless a table has more ids than that.

        Raises:
            ValueError: for an id out of range, under ``BoundsCheckMode.FATAL``.
        """
        values, stride = features.values(), features.stride()
        if stride == 0:  # as others send theirs
            return _with_values(features, values.long() if self._are_wide else values)
        out_of_range = torch.zeros_like(self._num_embeddings)
        mixed = mix_ids(
            values.long().contiguous(),
            features.offsets()[::stride].long().contiguous(),
            self._num_embeddings,
            out_of_range,
        )
        self._report(out_of_range)
        return _with_values(features, mixed if self._are_wide else mixed.to(values.dtype))


def _with_values(features: KeyedJaggedTensor, values: torch.Tensor) -> KeyedJaggedTensor:
    """The same bags of other ids."""
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        offsets=features.offsets(),
        stride=features.stride(),
        length_per_key=features.length_per_key_or_none(),
        offset_per_key=features.offset_per_key_or_none(),
    )


class CompressedGroupedPooledEmbeddingsLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup with our kernel for compressed groups."""

    _compressed_kernel: Callable[..., Any] = CompressedEmbeddingBag

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, device: Any, pg: Any, *args: Any
    ) -> Any:
        if GROUP_PARAM in (config.fused_params or {}):
            return self._compressed_kernel(config, pg, device, *args[:1])  # the sharding type
        return super()._create_embedding_kernel(config, device, pg, *args)


class OwnLookup:
    """What shardings of our tables have in common: they are TorchRec's, but for the lookup."""

    _lookup_type: type[CompressedGroupedPooledEmbeddingsLookup] = (
        CompressedGroupedPooledEmbeddingsLookup
    )
    _sharding_type: ShardingType
    _grouped_embedding_configs: list[GroupedEmbeddingConfig]
    _pg: Any
    _env: Any
    _device: Any

    def local_configs(self) -> list[GroupedEmbeddingConfig]:
        """The groups of tables on this rank."""
        return self._grouped_embedding_configs

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,  # noqa: ARG002  TorchRec's signature
        feature_processor: Any = None,
    ) -> BaseEmbeddingLookup[Any, Any]:
        """Lookup with our kernel."""
        return self._lookup_type(
            grouped_configs=self.local_configs(),
            pg=self._pg,
            device=device or self._device,
            feature_processor=feature_processor,
            sharding_type=self._sharding_type,
            env=self._env,
        )


class CompressedGroupedEmbeddingsLookup(GroupedEmbeddingsLookup):
    """TorchRec's lookup of sequences with our kernel for compressed groups."""

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, pg: Any, device: Any, *args: Any
    ) -> Any:
        if GROUP_PARAM in (config.fused_params or {}):
            return CompressedEmbedding(config, pg, device)
        return super()._create_embedding_kernel(config, pg, device, *args)


class OwnSequenceLookup:
    """What shardings of our sequences have in common: they are TorchRec's, but for the lookup."""

    _grouped_embedding_configs: list[GroupedEmbeddingConfig]
    _pg: Any
    _device: Any

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,  # noqa: ARG002  TorchRec's signature
        feature_processor: Any = None,  # noqa: ARG002
    ) -> BaseEmbeddingLookup[Any, Any]:
        """Lookup with our kernel."""
        return CompressedGroupedEmbeddingsLookup(
            grouped_configs=self._grouped_embedding_configs,
            pg=self._pg,
            device=device or self._device,
        )
