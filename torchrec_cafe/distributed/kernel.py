"""The compute kernel of compressed tables inside a TorchRec lookup."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import PoolingType, data_type_to_sparse_type
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.config import Cafe, MemRec, QuotientRemainder, remainder_rows
from torchrec_cafe.distributed._torchrec import (
    EmbeddingFusedOptimizer,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec_cafe.distributed.input import weights_of
from torchrec_cafe.distributed.row_range_kernel import OWN_PARAMS, RowRangeEmbeddingBag
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.ops import WEIGHTS_PER_LINE, PoolRows
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


def _first_row(table: ShardedEmbeddingTable) -> int:
    assert table.local_metadata is not None
    return table.local_metadata.shard_offsets[0]


def mem_rec_layout(group: CompressedGroup, first_shard: int, shards_held: int) -> MemRecLayout:
    """Where the rows and weights of virtual shards of a group of MEM-REC tables lie.

    Args:
        group: of MEM-REC tables.
        first_shard: the first that is held.
        shards_held: how many.
    """
    assert isinstance(group.kind, MemRec)
    return MemRecLayout(
        kind=group.kind,
        first_shard=first_shard,
        shards_held=shards_held,
        token_rows_per_shard=group.token_rows_per_shard,
        weights_per_shard=group.weights_per_shard,
    )


def divide_by_sizes(pooled: Tensor, features: KeyedJaggedTensor) -> Tensor:
    """Make means of sums, as TorchRec does: by the lengths of bags, or the sums of weights.

    Args:
        pooled: ``[B, F * D]``, sums.
        features: the ``F * B`` bags.
    """
    sizes = features.lengths()
    weights = weights_of(features)
    if weights is not None:
        sizes = torch.segment_reduce(weights, "sum", offsets=features.offsets(), initial=0.0)
    samples, keys = features.stride(), len(features.keys())
    by_sample = sizes.view(keys, samples).t().unsqueeze(2)
    sums = pooled.view(samples, keys, pooled.shape[1] // keys)
    return (sums / (by_sample + 1e-6)).view_as(pooled)


class CompressedEmbeddingBag(RowRangeEmbeddingBag):
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
        self.group = fused_params[GROUP_PARAM]
        device = device or torch.device("cpu")
        of_tbe = {k: v for k, v in fused_params.items() if k not in OWN_PARAMS}
        self._emb_module = RowRangeTBE(
            self._local_rows,
            config.embedding_tables[0].embedding_dim,
            weights_precision=data_type_to_sparse_type(config.data_type),
            device=device,
            fused_params=of_tbe,
        )
        self.refuse_row_counters(of_tbe)
        self.bags = CompressedBags(self._rows(device, of_tbe), self._emb_module)
        self._optim = EmbeddingFusedOptimizer(config, self._emb_module, pg)

    def _rows(self, device: torch.device, fused_params: dict[str, Any]) -> RowLookup:
        if isinstance(self.group.kind, MemRec):
            layout = mem_rec_layout(self.group, *self._shards())
            tables = [
                dataclasses.replace(
                    table, shared_rows=self.group.num_shards, first_row=layout.first_shard
                )
                for table in self.table_layouts()
            ]
            lookup = MemRecSamples if self.group.kind.per == "sample" else MemRecRows
            return lookup(tables, layout, self._emb_module, fused_params)
        if isinstance(self.group.kind, QuotientRemainder):
            return QuotientRemainderRows(self.table_layouts(), device)
        pool = self._pool_layout()
        return SharedRows(self.table_layouts(), pool, device, self._factors(pool, fused_params))

    def _factors(self, pool: PoolLayout | None, fused_params: dict[str, Any]) -> IdFactors | None:
        if pool is None or self.group.weights_per_shard == 0:
            return None
        num_hashes = pool.kind.weight_hashes
        weights = WeightTable(
            pool.first_shard,
            (pool.shards_held, self.group.weights_per_shard),
            per_row=WEIGHTS_PER_LINE,
            start=1 / num_hashes,
            device=self._emb_module.current_device,
            fused_params=fused_params,
        )
        return IdFactors(weights, num_hashes, self._emb_module)

    def table_layouts(self) -> list[TableLayout]:
        """Where this rank's parts of the tables lie, in the order of their row ranges."""
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

    def _shards(self) -> tuple[int, int]:
        """First virtual shard of the rank, and how many it holds."""
        pool = self._config.embedding_tables[-1]
        per_shard = self.group.pool_rows_per_shard
        return _first_row(pool) // per_shard, pool.local_rows // per_shard

    def forward(self, features: KeyedJaggedTensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Look up a batch whose ids the input dist has mixed and cut.

        Args:
            features: the rank's ids, ``[F * B]`` bags.

        Returns:
            ``[B, F * D]``; of tables whose rows are spread over ranks, the rank's part of the sums
            of bags, or what :class:`MemRecSamples` gives.
        """
        pooled = self.bags(
            features.values().long(), features.offsets().long(), weights_of(features)
        )
        if self.group.gives_parts:
            return pooled  # TorchRec divides the sum of the parts by the lengths of bags
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


class CompressedEmbedding(CompressedEmbeddingBag):
    """Kernel of one group of compressed tables whose ids each have a vector; see the base class."""

    def forward(self, features: KeyedJaggedTensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Look up a batch whose ids the input dist has mixed and cut.

        All rows of an id are on one rank, so that nothing is added up between ranks.

        Args:
            features: the rank's ids, ``[F * B]`` bags.

        Returns:
            ``[N, D]``, a vector for each id.
        """
        return self.bags.unpooled(features.values().long(), features.offsets().long())
