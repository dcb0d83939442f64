"""What every sharding of compressed tables has: ids mixed and checked, lookups by our kernel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    GroupedEmbeddingConfig,
    GroupedPooledEmbeddingsLookup,
    ShardedEmbeddingTable,
)
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.ops import mix_ids

logger = logging.getLogger(__name__)


def group_of(table: ShardedEmbeddingTable) -> CompressedGroup:
    """The group of a table that TorchRec has sharded."""
    assert table.fused_params is not None
    return table.fused_params[GROUP_PARAM]


class IdMixer(nn.Module):
    """Mixes the ids of a batch, and reports those out of range.

    Args:
        tables: the tables, in the order of the features of a batch; those without features are
            passed over. Their ``bounds_check_mode`` says what to do about ids out of range, as
            FBGEMM's; ``NONE`` is taken as ``IGNORE``.
        device: where the ids are.
    """

    _num_embeddings: torch.Tensor

    def __init__(
        self, tables: Sequence[ShardedEmbeddingTable], device: torch.device | None = None
    ) -> None:
        """Note the tables; see the class."""
        super().__init__()
        self._names = [table.name for table in tables for _ in range(table.num_features())]
        self._modes = [
            (table.fused_params or {}).get("bounds_check_mode", BoundsCheckMode.WARNING)
            for table in tables
            for _ in range(table.num_features())
        ]
        self._check = any(
            mode in (BoundsCheckMode.FATAL, BoundsCheckMode.WARNING) for mode in self._modes
        )
        sizes = [
            group_of(table).table(table.name).num_ids
            for table in tables
            for _ in range(table.num_features())
        ]
        self.register_buffer(
            "_num_embeddings",
            torch.tensor(sizes, dtype=torch.int64, device=device),
            persistent=False,
        )
        self._warned: set[str] = set()

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Mix; see the class.

        Args:
            features: ids of the uncompressed tables.

        Returns:
            The same bags of mixed ids.

        Raises:
            ValueError: for an id out of range, under ``BoundsCheckMode.FATAL``; for features that
                differ in batch size.
        """
        if features.variable_stride_per_key():
            raise ValueError(
                f"tables {', '.join(sorted(set(self._names)))}: compressed tables need the same "
                "batch size for every feature, got a KeyedJaggedTensor with variable stride"
            )
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


class CompressedGroupedPooledEmbeddingsLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup with our kernel for compressed groups."""

    _compressed_kernel: Callable[..., Any] = CompressedEmbeddingBag

    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, device: Any, pg: Any, *args: Any
    ) -> Any:
        if GROUP_PARAM in (config.fused_params or {}):
            return self._compressed_kernel(config, pg, device, *args[:1])  # the sharding type
        return super()._create_embedding_kernel(config, device, pg, *args)
