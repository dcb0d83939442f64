"""What the kernels of our tables have in common: one TBE that presents rows table by table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule

from torchrec_cafe.distributed._torchrec import (
    BaseBatchedEmbeddingBag,
    EmbeddingFusedOptimizer,
    TableBatchedEmbeddingSlice,
    mark_trained_in_backward,
)
from torchrec_cafe.distributed.types import GROUP_PARAM, CompressedGroup
from torchrec_cafe.tables import RowRangeTBE

#: Fused parameters that the TBE of a group does not get: they are ours, or it decides them itself.
OWN_PARAMS = frozenset({GROUP_PARAM, "bounds_check_mode", "cache_precision"})


class RowRangeEmbeddingBag(BaseBatchedEmbeddingBag[Tensor], FusedOptimizerModule):
    """Kernel of a group of tables whose rows are ranges of one physical table.

    To TorchRec they are ordinary fused tables: weights and optimizer state are checkpointed and
    resharded like any other table's. Subclasses set the attributes and look up.

    Attributes:
        group: the tables.
    """

    group: CompressedGroup
    _emb_module: RowRangeTBE
    _optim: EmbeddingFusedOptimizer

    @property
    def emb_module(self) -> SplitTableBatchedEmbeddingBagsCodegen:
        """The TBE that holds the rows."""
        return self._emb_module

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """The optimizer that runs inside the TBE's backward."""
        return self._optim

    def refuse_row_counters(self, fused_params: dict[str, Any]) -> None:
        """Raise a ``ValueError`` if the TBE counts by row: a row that moves has no counters."""
        if self._emb_module.counts_by_row:
            names = ", ".join(repr(table.name) for table in self.group.tables)
            raise ValueError(
                f"tables {names}: the optimizer of tables with `table=` must keep nothing but "
                f"momenta of rows, got {fused_params}; leave counter-based weight decay and "
                "use_rowwise_bias_correction out"
            )

    def named_buffers(  # torch's signature
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001, FBT002
        remove_duplicate: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[tuple[str, Tensor]]:
        """None: what there is besides weights, the sharded module presents as sharded tensors."""
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
        physical = self._emb_module.presented_tensors()[0]
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
            optimizer = type(self._optim)(
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
