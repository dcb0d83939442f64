"""Data-parallel MEM-REC tables: every rank has both tables, gradients are averaged by DDP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.embedding_sharding import BaseEmbeddingLookup, BaseSparseFeaturesDist
from torchrec.distributed.types import Awaitable, ShardingType
from torchrec.modules.embedding_configs import PoolingType, data_type_to_sparse_type
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    BaseBatchedEmbeddingBag,
    DpPooledEmbeddingSharding,
    DpSparseFeaturesDist,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
    TableBatchedEmbeddingSlice,
)
from torchrec_cafe.distributed.input import weights_of
from torchrec_cafe.distributed.kernel import divide_by_sizes, mem_rec_layout
from torchrec_cafe.distributed.lookup import CompressedGroupedPooledEmbeddingsLookup, IdMixer
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.tables import DenseMemRecBags, TableLayout


class DenseMemRecEmbeddingBag(BaseBatchedEmbeddingBag[Tensor]):
    """Kernel of one group of data-parallel MEM-REC tables, trained by the dense optimizer.

    Args:
        config: the group's tables as TorchRec has sharded them, the token rows last.
        pg: process group of the sharding.
        device: where the rows live.
        sharding_type: how the tables are sharded.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        """Allocate both tables; see the class."""
        super().__init__(config, pg, device, sharding_type)
        self.group: CompressedGroup = (config.fused_params or {})[GROUP_PARAM]
        tables = [
            TableLayout(
                name=table.name,
                num_ids=self.group.table(table.name).num_ids,
                shared_rows=self.group.num_shards,
                first_row=0,
                num_rows=0,
                num_features=table.num_features(),
                index=self.group.table(table.name).index,
            )
            for table in config.embedding_tables
            if table.num_features() > 0
        ]
        self.bags = DenseMemRecBags(
            tables,
            mem_rec_layout(self.group, 0, self.group.num_shards),
            config.embedding_tables[0].embedding_dim,
            precision=data_type_to_sparse_type(config.data_type),
            device=device or torch.device("cpu"),
        )

    @property
    def emb_module(self) -> DenseTableBatchedEmbeddingBagsCodegen:
        """The TBE that holds the token rows."""
        return self.bags.tbe

    def forward(self, features: KeyedJaggedTensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Look up a batch of mixed ids.

        Args:
            features: this rank's part of the batch, ``[F * B]`` bags.

        Returns:
            ``[B, F * D]``.
        """
        pooled = self.bags(
            features.values().long(), features.offsets().long(), weights_of(features)
        )
        if self._config.pooling is PoolingType.MEAN:
            pooled = divide_by_sizes(pooled, features)
        return pooled

    def named_buffers(  # torch's signature
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001, FBT002
        remove_duplicate: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[tuple[str, Tensor]]:
        """None: DDP has nothing to broadcast."""
        yield from ()

    def named_parameters(  # torch's signature
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001, FBT002
        remove_duplicate: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters whose gradients are averaged."""
        pool = f"{prefix}.{self.group.name}" if prefix else self.group.name
        rows: Any = self.bags.tbe.weights
        yield f"{pool}.weight", rows
        yield f"{pool}.weight_table", self.bags.weights

    def named_parameters_by_table(self) -> Iterator[tuple[str, TableBatchedEmbeddingSlice]]:
        """Token rows as a slice of FBGEMM's parameter; the other tables have none of their own."""
        for table in self._config.embedding_tables:
            size = table.local_rows * table.local_cols
            yield (
                table.name,
                TableBatchedEmbeddingSlice(
                    data=self.bags.tbe.weights,
                    start_offset=0,
                    end_offset=size,
                    num_embeddings=-1,
                    embedding_dim=table.local_cols,
                ),
            )


class CompressedDpSparseFeaturesDist(DpSparseFeaturesDist):
    """Mixes the ids, which stay where they are.

    Args:
        tables: the tables, in the order of the features of a batch.
        device: where the ids are.
    """

    def __init__(
        self, tables: list[ShardedEmbeddingTable], device: torch.device | None = None
    ) -> None:
        """Note the tables; see the class."""
        super().__init__()
        self._mixer = IdMixer(tables, device)

    def forward(
        self, sparse_features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Mix; see the class.

        Raises:
            ValueError: as :class:`IdMixer`.
        """
        return super().forward(self._mixer(sparse_features))


class DenseMemRecLookup(CompressedGroupedPooledEmbeddingsLookup):
    """TorchRec's lookup with the kernel of data-parallel MEM-REC tables."""

    _compressed_kernel = DenseMemRecEmbeddingBag


class CompressedDpPooledEmbeddingSharding(DpPooledEmbeddingSharding):
    """Data-parallel sharding of the compressed tables of a module."""

    def create_input_dist(
        self, device: torch.device | None = None
    ) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Input dist that mixes ids."""
        return CompressedDpSparseFeaturesDist(self.embedding_tables(), device or self._device)

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: Any = None,
    ) -> BaseEmbeddingLookup[Any, Any]:
        """Lookup with our kernel."""
        return DenseMemRecLookup(
            grouped_configs=self._grouped_embedding_configs,
            pg=self._env.process_group,
            device=device or self._device,
            feature_processor=feature_processor,
            scale_weight_gradients=False,  # as TorchRec: DDP averages
            sharding_type=ShardingType.DATA_PARALLEL,
            env=self._env,
        )
