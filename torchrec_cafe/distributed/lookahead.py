"""Look-ahead tables: TorchRec's own tables, whose rows are in slots only while they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import data_type_to_sparse_type
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.config import Lookahead
from torchrec_cafe.distributed._torchrec import (
    EmbeddingFusedOptimizer,
    GroupedEmbeddingConfig,
    RwPooledEmbeddingSharding,
    TwPooledEmbeddingSharding,
    TwRwPooledEmbeddingSharding,
    kernels_of_lookup,
)
from torchrec_cafe.distributed.bounds import BoundsReport
from torchrec_cafe.distributed.input import weights_of
from torchrec_cafe.distributed.lookup import CompressedGroupedPooledEmbeddingsLookup, OwnLookup
from torchrec_cafe.distributed.row_range_kernel import OWN_PARAMS, RowRangeEmbeddingBag
from torchrec_cafe.distributed.types import GROUP_PARAM
from torchrec_cafe.tables import (
    FileStore,
    LookaheadBags,
    MemoryStore,
    RowStore,
    SlotTBE,
    StoredTable,
    on_device,
)


class LookaheadFusedOptimizer(EmbeddingFusedOptimizer):
    """TorchRec's, whose state is up to date whenever it is asked for."""

    _state: Any = None

    @property
    def state(self) -> Any:
        """The optimizer state, in the store."""
        self._emb_module.flush()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state


class LookaheadEmbeddingBag(RowRangeEmbeddingBag):
    """Kernel of one group of look-ahead tables.

    Args:
        config: the group's tables as TorchRec has sharded them.
        pg: process group of the sharding.
        device: where the slots live. The rows lie in host memory; on a GPU, ``state_dict`` has
            tensors of the GPU over it.
        sharding_type: how the tables are sharded.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        """Allocate the rank's rows and slots; see the class."""
        super().__init__(config, pg, device, sharding_type)
        fused_params = config.fused_params or {}
        self.group = fused_params[GROUP_PARAM]
        kind = self.group.kind
        assert isinstance(kind, Lookahead)
        self._emb_module = SlotTBE(
            kind.slots_for(sum(self._local_rows)),
            config.embedding_tables[0].embedding_dim,
            weights_precision=data_type_to_sparse_type(config.data_type),
            device=device or torch.device("cpu"),
            fused_params={k: v for k, v in fused_params.items() if k not in OWN_PARAMS},
            pooling_mode=self._pooling,
        )
        self.refuse_row_counters(fused_params)
        store = self._store(kind)
        tables = [
            StoredTable(table.name, rows, table.num_features())
            for table, rows in zip(config.embedding_tables, self._local_rows, strict=True)
        ]
        self.bags = LookaheadBags(tables, self._emb_module, store)
        slots = self._emb_module.physical_tensors()[0]
        rows = on_device(store.tensors, slots.device)
        self._emb_module.present(rows, self._local_rows, self.bags.flush)
        self._report = BoundsReport(config.embedding_tables)
        self._optim = LookaheadFusedOptimizer(config, self._emb_module, pg)
        # As TorchRec's kernel does, before its sharded module does so again: a seed then gives the
        # weights that it gives uncached tables.
        self.init_parameters()

    def _store(self, kind: Lookahead) -> RowStore:
        rows, like = sum(self._local_rows), self._emb_module.physical_tensors()
        if kind.path is None:
            on_cpu = like[0].is_cpu
            return MemoryStore(rows, like, num_threads=1 if on_cpu else kind.io_threads)
        directory = Path(kind.path) / self.group.tables[0].name / f"rank_{dist.get_rank(self._pg)}"
        return FileStore(directory, rows, like, io_threads=kind.io_threads)

    def look_ahead(self, features: KeyedJaggedTensor) -> None:
        """Begin to bring the rows of a coming batch in.

        Args:
            features: what :meth:`forward` will be given.
        """
        self.bags.look_ahead(features.values(), features.offsets(), features.lengths_or_none())

    def forward(self, features: KeyedJaggedTensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Look up a batch.

        Args:
            features: the rank's ids, ``[F * B]`` bags.

        Returns:
            ``[B, F * D]``; of row-wise tables, the rank's part of the sums of bags.

        Raises:
            ValueError: for ids out of range, under ``BoundsCheckMode.FATAL``.
            ScratchpadFullError: if the batch has more rows than slots can be had for.
        """
        pooled = self.bags(
            features.values(),
            features.offsets(),
            weights_of(features),
            features.lengths_or_none(),
        )
        out_of_range = self.bags.out_of_range.clone()
        self.bags.out_of_range.zero_()
        self._report(out_of_range)
        return pooled

    def flush(self) -> None:
        """Write all rows back, before they are read from outside."""
        self.bags.flush()

    def purge(self) -> None:
        """Read rows anew before they are used again: they are overwritten from outside."""
        self.bags.flush()


class LookaheadGroupedPooledEmbeddingsLookup(CompressedGroupedPooledEmbeddingsLookup):
    """TorchRec's lookup of look-ahead tables."""

    _compressed_kernel = LookaheadEmbeddingBag

    def prefetch(
        self,
        sparse_features: KeyedJaggedTensor,
        forward_stream: torch.Stream | None = None,  # noqa: ARG002  TorchRec's signature
    ) -> None:
        """Begin to bring the rows of a coming batch in; TorchRec's pipelines call this.

        Args:
            sparse_features: of all groups.
            forward_stream: of no use here: the lookup waits for the rows itself.
        """
        for kernel, features in kernels_of_lookup(self, sparse_features):
            kernel.look_ahead(features)


class _LookaheadSharding(OwnLookup):
    """TorchRec's shardings, input and output dists, with the lookup above."""

    _lookup_type = LookaheadGroupedPooledEmbeddingsLookup


class LookaheadRwPooledEmbeddingSharding(_LookaheadSharding, RwPooledEmbeddingSharding):
    """Row-wise sharding of look-ahead tables."""

    _sharding_type = ShardingType.ROW_WISE


class LookaheadTwPooledEmbeddingSharding(_LookaheadSharding, TwPooledEmbeddingSharding):
    """Table-wise sharding of look-ahead tables."""

    _sharding_type = ShardingType.TABLE_WISE


class LookaheadTwRwPooledEmbeddingSharding(_LookaheadSharding, TwRwPooledEmbeddingSharding):
    """Table-row-wise sharding of look-ahead tables."""

    _sharding_type = ShardingType.TABLE_ROW_WISE

    def local_configs(self) -> list[GroupedEmbeddingConfig]:
        """See :meth:`OwnLookup.local_configs`."""
        return self._grouped_embedding_configs_per_rank[self._rank]


LOOKAHEAD_SHARDINGS: dict[str, Any] = {
    ShardingType.ROW_WISE.value: LookaheadRwPooledEmbeddingSharding,
    ShardingType.TABLE_WISE.value: LookaheadTwPooledEmbeddingSharding,
    ShardingType.TABLE_ROW_WISE.value: LookaheadTwRwPooledEmbeddingSharding,
}
