"""The compute kernel of compressed tables inside a TorchRec lookup."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import PoolingType, data_type_to_sparse_type
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.config import Cafe, MemRec, QuotientRemainder, remainder_rows
from torchrec_cafe.distributed._torchrec import (
    BaseBatchedEmbeddingBag,
    EmbeddingFusedOptimizer,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
    TableBatchedEmbeddingSlice,
    mark_trained_in_backward,
)
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.ops import PoolRows
from torchrec_cafe.tables import (
    CompressedBags,
    IdFactors,
    MemRecLayout,
    MemRecRows,
    MemRecSamples,
    PoolLayout,
    QuotientRemainderRows,
    RowLookup,
    RowRangeTBE,
    SharedRows,
    TableLayout,
    WeightTable,
    sample_vectors,
)

# Ids that may look up the same second row before it is of no use to any (CAFE+, section 3.6).
MEDIUM_IDS_PER_ROW = 100

# What the TBE of a compressed group decides itself.
_OWN_PARAMS = frozenset({GROUP_PARAM, "bounds_check_mode", "cache_precision"})


def _first_row(table: ShardedEmbeddingTable) -> int:
    assert table.local_metadata is not None
    return table.local_metadata.shard_offsets[0]


def divide_by_sizes(pooled: Tensor, features: KeyedJaggedTensor) -> Tensor:
    """Make means of sums, as TorchRec does: by the lengths of bags, or the sums of weights.

    Args:
        pooled: ``[B, F * D]``, sums.
        features: the ``F * B`` bags.
    """
    sizes = features.lengths()
    weights = features.weights_or_none()
    if weights is not None:
        sizes = torch.segment_reduce(weights, "sum", offsets=features.offsets(), initial=0.0)
    by_sample = sizes.view(-1, features.stride()).t().unsqueeze(2)
    sums = pooled.view(features.stride(), by_sample.shape[1], -1)
    return (sums / (by_sample + 1e-6)).view_as(pooled)


class CompressedEmbeddingBag(BaseBatchedEmbeddingBag[Tensor], FusedOptimizerModule):
    """Kernel of one group of compressed tables.

    To TorchRec its tables are ordinary fused tables of the shared rows, and the pool of hot rows
    is one more table without features; weights and optimizer state are checkpointed and resharded
    like any other table's.

    Args:
        config: the group's tables as TorchRec has sharded them, the pool last.
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
        """Allocate the rank's rows; see the class."""
        super().__init__(config, pg, device, sharding_type)
        fused_params = config.fused_params or {}
        self.group: CompressedGroup = fused_params[GROUP_PARAM]
        device = device or torch.device("cpu")
        of_tbe = {k: v for k, v in fused_params.items() if k not in _OWN_PARAMS}
        self._emb_module = RowRangeTBE(
            self._local_rows,
            config.embedding_tables[0].embedding_dim,
            weights_precision=data_type_to_sparse_type(config.data_type),
            device=device,
            fused_params=of_tbe,
        )
        self.bags = CompressedBags(self._rows(device, of_tbe), self._emb_module)
        self._optim = EmbeddingFusedOptimizer(config, self._emb_module, pg)

    def _rows(self, device: torch.device, fused_params: dict[str, Any]) -> RowLookup:
        if isinstance(self.group.kind, MemRec):
            layout = self._mem_rec_layout(self.group.kind)
            tables = [
                dataclasses.replace(
                    table, shared_rows=self.group.num_shards, first_row=layout.first_shard
                )
                for table in self._table_layouts()
            ]
            lookup = MemRecSamples if self.group.kind.per == "sample" else MemRecRows
            return lookup(tables, layout, self._emb_module, fused_params)
        if isinstance(self.group.kind, QuotientRemainder):
            return QuotientRemainderRows(self._table_layouts(), device)
        pool = self._pool_layout()
        return SharedRows(self._table_layouts(), pool, device, self._factors(pool, fused_params))

    def _factors(self, pool: PoolLayout | None, fused_params: dict[str, Any]) -> IdFactors | None:
        if pool is None or self.group.weights_per_shard == 0:
            return None
        num_hashes = pool.kind.num_weight_hashes
        weights = WeightTable(
            pool.first_shard,
            (pool.shards_held, self.group.weights_per_shard),
            start=1 / num_hashes,
            device=self._emb_module.current_device,
            fused_params=fused_params,
        )
        return IdFactors(weights, num_hashes, self._emb_module)

    def _table_layouts(self) -> list[TableLayout]:
        layouts = []
        for table in self._config.embedding_tables:
            if table.num_features() == 0:
                continue  # the pool
            compressed = self.group.table(table.name)
            shared_rows = compressed.shared_rows
            if isinstance(self.group.kind, QuotientRemainder):
                shared_rows = remainder_rows(compressed.num_ids, shared_rows)
            layouts.append(
                TableLayout(
                    name=table.name,
                    num_ids=compressed.num_ids,
                    shared_rows=shared_rows,
                    first_row=_first_row(table),
                    num_rows=table.local_rows,
                    num_features=table.num_features(),
                    index=compressed.index,
                )
            )
        return layouts

    def _pool_layout(self) -> PoolLayout | None:
        if not self.group.has_pool:
            return None
        assert isinstance(self.group.kind, Cafe)
        first_shard, shards_held = self._shards()
        return PoolLayout(
            kind=self.group.kind,
            num_shards=self.group.num_shards,
            first_shard=first_shard,
            shards_held=shards_held,
            buckets_per_shard=self.group.buckets_per_shard,
            rows=PoolRows(
                offset=sum(self._local_rows[:-1]),
                hot_rows_per_shard=self.group.hot_rows_per_shard,
                second_rows_per_shard=self.group.second_rows_per_shard,
            ),
            num_medium=MEDIUM_IDS_PER_ROW * self.group.second_rows_per_shard,
        )

    def _mem_rec_layout(self, kind: MemRec) -> MemRecLayout:
        first_shard, shards_held = self._shards()
        return MemRecLayout(
            kind=kind,
            first_shard=first_shard,
            shards_held=shards_held,
            token_rows_per_shard=self.group.token_rows_per_shard,
            weights_per_shard=self.group.weights_per_shard,
        )

    def _shards(self) -> tuple[int, int]:
        """First virtual shard of the rank, and how many it holds."""
        pool = self._config.embedding_tables[-1]
        per_shard = self.group.pool_rows_per_shard
        return _first_row(pool) // per_shard, pool.local_rows // per_shard

    @property
    def emb_module(self) -> SplitTableBatchedEmbeddingBagsCodegen:
        """The TBE that holds the rows."""
        return self._emb_module

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """The optimizer that runs inside the TBE's backward."""
        return self._optim

    def forward(self, features: KeyedJaggedTensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Look up a batch whose ids the input dist has mixed and cut.

        Args:
            features: the rank's ids, ``[F * B]`` bags.

        Returns:
            ``[B, F * D]``; of row-wise tables, the rank's part of the sums of bags, or what
            :class:`MemRecSamples` gives.

        Raises:
            ValueError: for a batch whose features differ in batch size.
        """
        if features.variable_stride_per_key():
            names = ", ".join(repr(table.name) for table in self.group.tables)
            raise ValueError(
                f"tables {names}: compressed tables need the same batch size for every feature, "
                "got a KeyedJaggedTensor with variable stride; leave the tables uncompressed or "
                "pad the batch"
            )
        weights = features.weights_or_none()
        pooled = self.bags(features.values().long(), features.offsets().long(), weights)
        if self.group.sharding_type == ShardingType.ROW_WISE.value:
            return pooled  # a part; TorchRec divides the sum by the lengths of bags
        if self.group.is_per_sample:
            pooled = sample_vectors(pooled, self._config.num_features())
        if self._config.pooling is PoolingType.MEAN:
            pooled = divide_by_sizes(pooled, features)
        return pooled

    def flush(self) -> None:
        """Bring rows and sketch up to date, before they are read from outside."""
        self.bags.settle()

    def purge(self) -> None:
        """Forget what is not part of the state, before it is overwritten from outside."""
        if self.bags.state is not None:
            self.bags.state.reload()

    def named_buffers(  # torch's signature
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001, FBT002
        remove_duplicate: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[tuple[str, Tensor]]:
        """None: the sharded module presents the sketch as sharded tensors."""
        yield from ()

    def named_parameters(  # torch's signature
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001, FBT002
        remove_duplicate: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights by table, marked as trained in backward."""
        for name, weight in self.named_split_embedding_weights(prefix, recurse, remove_duplicate):
            parameter = nn.Parameter(weight)
            mark_trained_in_backward(parameter, EmptyFusedOptimizer())
            yield name, parameter

    def named_parameters_by_table(self) -> Iterator[tuple[str, TableBatchedEmbeddingSlice]]:
        """Weights by table as slices of the physical table, each with its optimizer."""
        physical = self._emb_module.physical_tensors()[0]
        weights = self._emb_module.split_embedding_weights()
        states = self._emb_module.get_optimizer_state()
        start = 0
        for table, weight in zip(self._config.embedding_tables, weights, strict=True):
            parameter = TableBatchedEmbeddingSlice(
                data=physical.view(-1),
                start_offset=start,
                end_offset=start + weight.numel(),
                num_embeddings=-1,
                embedding_dim=physical.shape[1],
            )
            start += weight.numel()
            optimizer = EmbeddingFusedOptimizer(
                self._config,
                self._emb_module,
                self._pg,
                create_for_table=table.name,
                param_weight_for_table=parameter,
                embedding_weights_by_table=weights,
                all_optimizer_states=states,
            )
            mark_trained_in_backward(parameter, optimizer)
            yield table.name, parameter
