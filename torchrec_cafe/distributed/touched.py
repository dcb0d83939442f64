"""Which rows of a kernel were touched, and where they lie in the whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.config import Lookahead
from torchrec_cafe.distributed.data_parallel import DenseMemRecEmbeddingBag
from torchrec_cafe.distributed.gathered import first_rows, group_layout
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.types import CompressedGroup
from torchrec_cafe.ops.bloom import WEIGHTS_PER_ROW
from torchrec_cafe.tables import WeightTable
from torchrec_cafe.tables.touched import TouchedBuckets, TouchedRows

#: Modules whose kernels are tracked.
FOLLOWED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Piece:
    """A rank's part of the rows of something.

    Attributes:
        name: of what.
        first: row and column of the whole at which the part begins.
        tensor: the part.
        touched: int64 ``[n]``, rows of the part, ascending.
    """

    name: str
    first: tuple[int, int]
    tensor: Tensor
    touched: Tensor


def rows_of(group: CompressedGroup) -> str:
    """Name of the physical rows of a group."""
    return f"{group.name}/rows"


def weights_of(group: CompressedGroup) -> str:
    """Name of the weights of a group."""
    return f"{group.name}/weights"


def buckets_of(group: CompressedGroup) -> str:
    """Name of the buckets of a group's sketch."""
    return f"{group.name}/buckets"


class TrackedKernel:
    """Notes which rows of a kernel are touched.

    Args:
        kernel: of TorchRec or of this package. All rows of replicas, which a dense optimizer
            trains, are taken as touched.

    Attributes:
        buckets: of its sketch, if it has one.
    """

    def __init__(self, kernel: Any) -> None:
        """Begin to take notes; see the class."""
        self.kernel: Any = kernel
        self.is_compressed = isinstance(kernel, CompressedEmbeddingBag)
        self._rows: TouchedRows | None = None
        self._weights: TouchedRows | None = None
        self.buckets: TouchedBuckets | None = None
        if isinstance(kernel, FusedOptimizerModule):
            weights: list[Tensor] = self.kernel.split_embedding_weights()
            count = max(1, sum(len(rows) for rows in weights))
            device = weights[0].device if weights else torch.device("cpu")
            self._rows = TouchedRows(count, device)
        if isinstance(kernel, CompressedEmbeddingBag):
            kernel.bags.touched = self._rows
            table = self._weight_table
            if table is not None:
                # One more: operators on CUDA give that for ids without weights.
                count = table.table.numel() // table.per_row + 1
                table.touched = self._weights = TouchedRows(count, table.table.device)
            if kernel.bags.pool is not None:
                self.buckets = TouchedBuckets(kernel.bags.pool.sketch.buckets)

    @property
    def _weight_table(self) -> WeightTable | None:
        bags: Any = self.kernel.bags
        if bags.pool is not None:
            return None if bags.rows.factors is None else bags.rows.factors.weights
        return bags.state if isinstance(bags.state, WeightTable) else None

    def close(self, version: int) -> None:
        """End a version: what is touched from now on belongs to the next."""
        self.kernel.flush()
        if self.buckets is not None:
            self.buckets.update(self.kernel.bags.pool.sketch.buckets, version)
        for touched in (self._rows, self._weights):
            if touched is not None:
                touched.version = version + 1

    def touch_all(self) -> None:
        """Note all rows: they were written from outside."""
        for touched in (self._rows, self._weights):
            if touched is not None:
                touched.stamps.fill_(touched.version)

    def look_up(self, features: KeyedJaggedTensor) -> None:
        """Note what a batch looks up in tables that are not compressed.

        Args:
            features: as the kernel gets them.
        """
        if self._rows is None or self.is_compressed:
            return
        ends, values, feature, first = features.offset_per_key(), features.values(), 0, 0
        for table in self.kernel.config.embedding_tables:
            for _ in range(table.num_features()):
                ids = values[ends[feature] : ends[feature + 1]].long()
                # FBGEMM takes ids out of range as 0.
                ids = torch.where((ids >= 0) & (ids < table.local_rows), ids, 0)
                self._rows.mark(ids + first)
                feature += 1
            first += table.local_rows

    def pieces(self, since: int) -> Iterator[Piece]:
        """The kernel's rows, weights and buckets.

        Args:
            since: version after which they count as touched.
        """
        group: Any = getattr(self.kernel, "group", None)
        whole: dict[str, int] = {}
        if group is not None and not isinstance(group.kind, Lookahead):
            whole = first_rows(group_layout(group), group)
        touched = None if self._rows is None else self._rows.since(since)
        begin = 0
        weights = self.kernel.split_embedding_weights()
        if isinstance(self.kernel, DenseMemRecEmbeddingBag):
            weights = [self.kernel.bags.token_rows]
            tables = self.kernel.config.embedding_tables[-1:]
        else:
            tables = self.kernel.config.embedding_tables
        for table, rows in zip(tables, weights, strict=True):
            at = table.local_metadata
            row, column = (0, 0) if at is None else tuple(at.shard_offsets)
            name = table.name
            if group is not None and whole:
                name, row = rows_of(group), row + whole[table.name]
            mine = _within(touched, begin, len(rows))
            yield Piece(name, (row, column), rows, mine)
            begin += len(rows)
        yield from self._state_pieces(since)

    def _state_pieces(self, since: int) -> Iterator[Piece]:
        kernel = self.kernel
        if isinstance(kernel, DenseMemRecEmbeddingBag):
            weights = kernel.bags.weights.detach().view(-1, WEIGHTS_PER_ROW)
            everything = torch.arange(len(weights), device=weights.device)
            yield Piece(weights_of(kernel.group), (0, 0), weights, everything)
        if not self.is_compressed:
            return
        table = self._weight_table
        if table is not None and self._weights is not None:
            weights = table.table.view(-1, table.per_row)
            first = table.first_shard * table.shape[1] // table.per_row
            mine = _within(self._weights.since(since), 0, len(weights))
            yield Piece(weights_of(self.kernel.group), (first, 0), weights, mine)
        if self.buckets is not None:
            buckets = self.buckets.known.flatten(0, 1)
            pool: Any = self.kernel.bags.pool
            first = pool.first_shard * self.buckets.known.shape[1]
            mine = self.buckets.since(since)
            yield Piece(buckets_of(self.kernel.group), (first, 0), buckets, mine)


def _within(touched: Tensor | None, begin: int, count: int) -> Tensor:
    """The touched rows of a range, less its first; all of it, if there are no notes."""
    if touched is None:
        return torch.arange(count)
    return touched[(touched >= begin) & (touched < begin + count)] - begin
