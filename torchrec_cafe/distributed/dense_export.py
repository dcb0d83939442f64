"""Compressed tables as a checkpoint of the uncompressed model, row by row while it is written."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm

from torchrec_cafe.distributed._torchrec import process_group_of
from torchrec_cafe.distributed.gathered import (
    collections_with_kinds,
    compressed_groups,
    gather_tables,
)
from torchrec_cafe.tables.view import TableView

#: Bytes of the rows that are computed and written at a time.
CHUNK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class DenseTable:
    """An uncompressed table that is computed when it is written.

    Attributes:
        table: the compressed table.
        rank: of this process; it writes every ``world_size``-th chunk, beginning with this one.
        world_size: ranks that write the table together.
    """

    table: TableView
    rank: int
    world_size: int

    @property
    def chunk_rows(self) -> int:
        """Rows that are computed and written at a time."""
        return max(1, CHUNK_BYTES // (self.table.size[1] * self.table.dtype.itemsize))

    def chunk(self, begin: int) -> Tensor:
        """The chunk whose first row is ``begin``."""
        end = min(begin + self.chunk_rows, self.table.size[0])
        return self.table.vectors(torch.arange(begin, end))

    def write_items(self, key: str) -> list[WriteItem]:
        """This rank's part of the table, in chunks.

        Args:
            key: of the table in the checkpoint.
        """
        num_rows, dim = self.table.size
        step = self.chunk_rows
        return [
            WriteItem(
                index=MetadataIndex(key, torch.Size([begin, 0])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size([begin, 0]),
                        sizes=torch.Size([min(step, num_rows - begin), dim]),
                    ),
                    properties=TensorProperties(dtype=self.table.dtype),
                    size=self.table.size,
                ),
            )
            for begin in range(step * self.rank, num_rows, step * self.world_size)
        ]

    def __reduce__(self) -> NoReturn:
        """Refuse to be saved without the planner that computes it."""
        raise TypeError(
            f"table {self.table.name!r} of `dense_state_dict` is computed while it is written: "
            "save it with dcp.save(..., planner=torchrec_cafe.DenseSavePlanner())"
        )


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of the uncompressed model; every rank has to call it.

    Save it with :class:`DenseSavePlanner`; stock TorchRec then loads it on any number of ranks::

        dcp.save(
            {"model": tc.dense_state_dict(model)},
            checkpoint_id=folder,
            planner=tc.DenseSavePlanner(),
        )

    Compressed tables are brought together on every rank, at their compressed size. Their rows are
    computed while they are written; the tables of a pool are left out. Everything else is as in
    ``model.state_dict()``. Optimizer state is not exported.

    Args:
        model: sharded by ``DistributedModelParallel``. What the last step has taught is applied.

    Returns:
        By key; compressed tables as :class:`DenseTable`.

    Raises:
        ValueError: if an id of a table has no vector of its own, as in ``MemRec(per="sample")``.
    """
    state = dict(model.state_dict())
    tables = gather_tables(model)
    for prefix, module in collections_with_kinds(model):
        ranks = process_group_of(module)
        groups = compressed_groups(module)
        names = [table.name for group in groups for table in group.tables]
        compressed = tuple(f"{prefix}{name}." for name in (*names, *(g.name for g in groups)))
        for key in [key for key in state if key.startswith(compressed)]:
            del state[key]
        for name in names:
            state[f"{prefix}{name}.weight"] = DenseTable(
                tables[name], dist.get_rank(ranks), dist.get_world_size(ranks)
            )
    return state


class DenseSavePlanner(DefaultSavePlanner):
    """DCP's planner of a save, for a state dict with tables that are computed when written.

    A rank computes and writes 32 MiB of a table at a time; rank 0 shows its progress. Every
    argument keeps its meaning.
    """

    _progress: tqdm[NoReturn] | None = None

    def create_local_plan(self) -> SavePlan:
        """The default plan, and chunks of dense tables."""
        everything = self.state_dict
        tables = {k: v for k, v in everything.items() if isinstance(v, DenseTable)}
        self.state_dict = {k: v for k, v in everything.items() if k not in tables}
        plan = super().create_local_plan()
        self.state_dict = everything
        items = [item for key, table in tables.items() for item in table.write_items(key)]
        if items and self.is_coordinator:
            rows = sum(item.tensor_data.chunk.sizes[0] for item in items if item.tensor_data)
            self._progress = tqdm(total=rows, unit="row", unit_scale=True, desc="dense rows")
        self.plan = dataclasses.replace(plan, items=[*plan.items, *items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The object of an item; rows of a dense table are computed."""
        table = self.state_dict[index.fqn]
        if not isinstance(table, DenseTable):
            return super().lookup_object(index)
        assert index.offset is not None
        rows = table.chunk(index.offset[0])
        progress = cast("tqdm[NoReturn] | None", self._progress)
        if progress is not None:
            progress.update(len(rows))
            if progress.n == progress.total:
                progress.close()
        return rows
