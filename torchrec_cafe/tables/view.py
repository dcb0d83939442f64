"""A group of compressed tables in one place, read-only: the rows of any ids, on demand.

Shape legend: N ids, D columns, S virtual shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_cafe.config import Cafe, MemRec, QuotientRemainder, TableKind
from torchrec_cafe.ops import PoolRows
from torchrec_cafe.tables.mem_rec import MemRecLayout
from torchrec_cafe.tables.row_maps import (
    MemRecRowMap,
    QuotientRemainderRowMap,
    RowMap,
    SharedRowMap,
)
from torchrec_cafe.tables.rows import TableLayout


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """Where the rows of a group lie that is on no rank but here, in full.

    Attributes:
        kind: of the tables.
        tables: the tables, in the order of their row ranges, each with one feature.
        pool: where hot and second rows lie; of ``MemRec``, ``offset`` is that of the token rows.
        mem_rec: of ``MemRec`` tables, where token rows and weights lie; ``None`` of others.
        num_rows: physical rows, those of the pool last.
    """

    kind: TableKind
    tables: tuple[TableLayout, ...]
    pool: PoolRows
    mem_rec: MemRecLayout | None
    num_rows: int

    def check_vectors(self) -> None:
        """Check that every id has a vector of its own.

        Raises:
            ValueError: naming the tables, if it has not.
        """
        if isinstance(self.kind, MemRec) and self.kind.per == "sample":
            raise ValueError(
                f"tables {[table.name for table in self.tables]}: an id of a MemRec(per='sample') "
                "table has no vector of its own; keep the table as it is in training, or use "
                "MemRec(per='token')"
            )


@dataclass(frozen=True, kw_only=True)
class GroupView:
    """All that lookups of a group need, in one place.

    It takes what the kind says is resident over all ranks
    (:class:`torchrec_cafe.MemoryBreakdown`), less what the sketch has for learning.

    Attributes:
        layout: where the rows lie.
        rows: float32 or float16 ``[R, D]``, the physical rows.
        state: ``sketch_buckets`` int64 ``[S, W, 8]``, what lookups read of the sketch
            (:func:`torchrec_cafe.tables.touched.of_lookups`), and ``weight_table`` float32
            ``[S, weights]``, as far as the kind has them.
    """

    layout: GroupLayout
    rows: Tensor
    state: Mapping[str, Tensor]

    def row_map(self, tables: Sequence[str]) -> RowMap:
        """What finds the rows of a batch.

        Args:
            tables: table of each feature of a batch.

        Raises:
            ValueError: for a table that the group does not have, or of which an id has no vector.
        """
        self.layout.check_vectors()
        layouts = self.layout.tables
        names = [table.name for table in layouts]
        unknown = sorted(set(tables) - set(names))
        if unknown:
            raise ValueError(f"tables must be among {names}, got {unknown}")
        features = [names.index(table) for table in tables]
        kind = self.layout.kind
        if self.layout.mem_rec is not None:
            return MemRecRowMap(
                layouts, features, layout=self.layout.mem_rec, weights=self.state["weight_table"]
            )
        if isinstance(kind, QuotientRemainder):
            return QuotientRemainderRowMap(layouts, features)
        no_buckets = torch.zeros((0, 0, 8), dtype=torch.int64)
        return SharedRowMap(
            layouts,
            features,
            pool=self.layout.pool,
            buckets=self.state.get("sketch_buckets", no_buckets),
            weights=self.state.get("weight_table", torch.zeros((0, 0))),
            num_hashes=kind.weight_hashes if isinstance(kind, Cafe) else 0,
        )

    def vectors(self, table: str, ids: Tensor) -> Tensor:
        """What a lookup of single ids gives.

        Args:
            table: name of the table.
            ids: int64 ``[N]``, ids of the uncompressed table; one out of range is taken as 0.

        Returns:
            ``[N, D]``, in the dtype of the rows.

        Raises:
            ValueError: as :meth:`row_map`.

        Note:
            Deterministic. Rows are added up in float32, as in lookups.
        """
        row_map = self.row_map([table])
        rows, starts, source, factors = row_map(ids, torch.arange(len(ids) + 1))
        weight = self.rows
        if weight.dtype is not torch.float32:
            weight, rows = weight.index_select(0, rows).float(), torch.arange(len(rows))
        pooled = torch.nn.functional.embedding_bag(
            rows,
            weight,
            starts,
            mode="sum",
            include_last_offset=True,
            per_sample_weights=factors.index_select(0, source) if row_map.has_factors else None,
        )
        return pooled.to(self.rows.dtype)


@dataclass(frozen=True)
class TableView:
    """One table of a group that is in one place, read-only.

    Attributes:
        group: the group.
        name: of the table.
    """

    group: GroupView
    name: str

    @property
    def size(self) -> torch.Size:
        """Shape of the uncompressed table, ``[num_embeddings, D]``."""
        (layout,) = (table for table in self.group.layout.tables if table.name == self.name)
        return torch.Size([layout.num_ids, self.group.rows.shape[1]])

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.group.rows.dtype

    def vectors(self, ids: Tensor) -> Tensor:
        """What a lookup of single ids gives; see :meth:`GroupView.vectors`."""
        return self.group.vectors(self.name, ids)
