"""Compressed tables from a checkpoint of uncompressed ones, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import StorageReader
from tqdm import tqdm

from torchrec_cafe.config import Cafe, Hash
from torchrec_cafe.distributed._torchrec import kernels_of, process_group_of, tables_of
from torchrec_cafe.distributed.dense_source import DenseSource, RowRangeReader
from torchrec_cafe.distributed.gathered import collections_with_kinds, compressed_groups
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.sharded_collection import ShardedCompressedCollection
from torchrec_cafe.distributed.touched import FOLLOWED
from torchrec_cafe.distributed.types import CompressedGroup, CompressedTable
from torchrec_cafe.ops import first_mixed_id, mix_ids
from torchrec_cafe.tables.filling import Counted, GroupFiller
from torchrec_cafe.tables.id_counts import IdCounts

#: Bytes of the rows that a rank reads at a time.
CHUNK_BYTES = 32 << 20


def convert(  # noqa: PLR0913  a checkpoint, as DCP names it, and what is in it
    model: nn.Module,
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    counts: Mapping[str, IdCounts],
    storage_reader: StorageReader | None = None,
    model_key: str = "model",
    optimizer_key: str | None = None,
) -> None:
    """Load a checkpoint of the uncompressed model into a model with compressed tables.

    Every rank has to call it. Tables are read once, in ranges of rows that the ranks share out, and
    each row goes to the rank that owns its id. ``Cafe`` tables: the most frequent ids get hot rows,
    which are the ids' own rows (divided by their factors, if the kind has such); shared rows become
    the mean of the ids that look them up, weighted by their lookups; second rows are 0, factors at
    their start. ``Hash`` tables: the same without hot rows. All else that the model's state dict
    has (TorchRec's own tables, ``Lookahead`` tables, dense layers) is loaded by DCP as ever.

    Args:
        model: sharded by ``DistributedModelParallel``; mutated.
        checkpoint_id: of the checkpoint, as ``torch.distributed.checkpoint.load`` takes it; written
            by ``dcp.save({model_key: model.state_dict(), ...})`` on any number of ranks.
        counts: lookups of ids, by table; all ids of a table that is left out weigh the same, and
            none of them is hot.
        storage_reader: instead of ``checkpoint_id``, as DCP takes it. DCP's own readers load all
            that a rank has saved of a table for each range of its rows.
        model_key: name of the model's state dict in the checkpoint; ``""``: it was not in another.
        optimizer_key: name of the optimizer's, if the states of rows are wanted, too: hot ids keep
            theirs, shared rows get the mean. ``None``: states begin at 0.

    Raises:
        ValueError: naming the table or key, if a table's kind cannot be filled, the checkpoint
            lacks it or has it in another shape, or counts do not fit; the model is untouched then.
        OSError: if the checkpoint cannot be read.

    Note:
        Deterministic for a given number of ranks, on a CPU.
    """
    if (checkpoint_id is None) == (storage_reader is None):
        raise ValueError("give checkpoint_id or storage_reader, and not both")
    if any(module in FOLLOWED for module in model.modules()):
        raise ValueError("convert the model before it has a DeltaTracker, which would miss it")
    source = DenseSource(storage_reader or RowRangeReader(str(checkpoint_id)))
    named = _Named(source, _joined(model_key), optimizer_key)
    jobs = [
        job for prefix, module in collections_with_kinds(model) for job in _jobs(prefix, module)
    ]
    others: dict[str, Any] = {}
    with _on_all_ranks():
        _check(jobs, named, counts)
        others = _others(model, jobs, named)
    total = sum(table.num_ids for job in jobs for table in job.group.tables)
    with tqdm(
        total=total, unit="row", unit_scale=True, desc="convert", disable=dist.get_rank() > 0
    ) as progress:
        for job in jobs:
            _fill(job, named, counts, progress)
    if others:
        dcp.load(others, storage_reader=storage_reader or dcp.FileSystemReader(str(checkpoint_id)))


@contextmanager
def _on_all_ranks() -> Iterator[None]:
    """Let a refusal of one rank be raised on all: the others would wait for it."""
    message = None
    try:
        yield
    except ValueError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for refused in messages:
        if refused is not None:
            raise ValueError(refused)


@dataclass(frozen=True)
class _Job:
    """A group that is to be filled.

    Attributes:
        prefix: of the keys of its tables in the model's state dict.
        module: that has it.
        group: the group.
        kernel: its kernel on this rank, if it has a part.
    """

    prefix: str
    module: ShardedCompressedCollection
    group: CompressedGroup
    kernel: CompressedEmbeddingBag | None


@dataclass(frozen=True)
class _Named:
    """The tensors of a checkpoint by what they are.

    Attributes:
        source: has them.
        model: what goes before the keys of the model's state dict.
        optimizer: name of the optimizer's state dict; ``None``: not wanted.
    """

    source: DenseSource
    model: str
    optimizer: str | None

    def keys(self, job: _Job, table: CompressedTable) -> list[str]:
        """Keys of a table's weights and, if they are wanted, states."""
        weight = f"{job.prefix}{table.name}.weight"
        keys = [f"{self.model}{weight}"]
        if self.optimizer is not None:
            states = f"{_joined(self.optimizer)}state.{weight}.{table.name}.momentum"
            number = 1
            while self.source.size(f"{states}{number}") is not None:
                keys.append(f"{states}{number}")
                number += 1
        return keys

    def values(self, keys: list[str], table: CompressedTable, begin: int, end: int) -> Tensor:
        """Weights and states of some rows side by side, float32 ``[end - begin, C]``.

        TorchRec saves the row-wise states of a table that is cut by columns one after the other:
        the mean is that of the whole row.
        """
        parts = []
        for key in keys:
            size = self.source.size(key)
            assert size is not None
            blocks = [
                self.source.rows(key, first + begin, first + end).float()
                for first in range(0, size[0], table.num_ids)
            ]
            mean = blocks[0] if len(blocks) == 1 else torch.stack(blocks).mean(0)
            parts.append(mean if mean.dim() == 2 else mean.unsqueeze(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _joined(key: str) -> str:
    return f"{key}." if key else ""


def _jobs(prefix: str, module: ShardedCompressedCollection) -> Iterator[_Job]:
    for group in compressed_groups(module):
        mine = (k for k in kernels_of(module) if isinstance(k, CompressedEmbeddingBag))
        kernel = next((kernel for kernel in mine if kernel.group == group), None)
        yield _Job(prefix, module, group, kernel)


def _check(jobs: list[_Job], named: _Named, counts: Mapping[str, IdCounts]) -> None:
    """Refuse what cannot be done before anything is."""
    tables = {table.name: table for job in jobs for table in job.group.tables}
    unknown = sorted(counts.keys() - tables.keys())
    if unknown:
        raise ValueError(
            f"counts are of tables {unknown}, but the compressed tables of the model are "
            f"{sorted(tables)}; leave others out"
        )
    for job in jobs:
        kind = job.group.kind
        for table in job.group.tables:
            if not isinstance(kind, Cafe | Hash):
                raise ValueError(
                    f"table {table.name!r}: only Cafe and Hash tables can be filled from an "
                    f"uncompressed one, got {type(kind).__name__}: the rows of its ids are sums or "
                    "products that have to be trained; give it another kind or train it anew"
                )
            _check_table(job, table, named, counts.get(table.name))


def _check_table(job: _Job, table: CompressedTable, named: _Named, counts: IdCounts | None) -> None:
    source = named.source
    key, *states = named.keys(job, table)
    size = source.size(key)
    if size is None:
        similar = [k for k in source.keys() if k.endswith(f"{table.name}.weight")]
        raise ValueError(
            f"table {table.name!r}: the checkpoint must have {key!r}, but has {similar}; set "
            "`model_key` to the name under which the model's state dict was saved"
        )
    dim = next(
        config.embedding_dim for config in tables_of(job.module) if config.name == table.name
    )
    if tuple(size) != (table.num_ids, dim):
        raise ValueError(
            f"table {table.name!r}: {key!r} must have shape {[table.num_ids, dim]}, got "
            f"{list(size)}; convert into a model of the same uncompressed tables"
        )
    if named.optimizer is not None and job.kernel is not None:
        _check_states(table, states, named, job.kernel)
    if counts is not None and len(counts.ids) > 0:
        first, last = int(counts.ids[0]), int(counts.ids[-1])
        if first < 0 or last >= table.num_ids:
            raise ValueError(
                f"table {table.name!r}: counted ids must be in [0, {table.num_ids}), got "
                f"{first} to {last}"
            )


def _check_states(
    table: CompressedTable, keys: list[str], named: _Named, kernel: CompressedEmbeddingBag
) -> None:
    wanted = [list(state.shape[1:]) for state in kernel.bags.tbe.physical_tensors()[1:]]
    sizes = [list(named.source.size(key) or [1]) for key in keys]
    if wanted != [size[1:] for size in sizes] or any(size[0] % table.num_ids for size in sizes):
        raise ValueError(
            f"table {table.name!r}: its optimizer keeps states of shapes {wanted} for a row, but "
            f"{named.optimizer!r} of the checkpoint has {sizes} for the table; train with the "
            "optimizer of the checkpoint, or leave `optimizer_key` out: states then begin at 0"
        )


def _others(model: nn.Module, jobs: list[_Job], named: _Named) -> dict[str, Any]:
    """What DCP loads as ever: all tensors of the model that are no part of a compressed group."""
    compressed = tuple(
        f"{job.prefix}{name}."
        for job in jobs
        for name in (job.group.name, *(table.name for table in job.group.tables))
    )
    others = {
        f"{named.model}{key}": value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) or hasattr(value, "local_shards")
        if not key.startswith(compressed)
    }
    missing = sorted(key for key in others if named.source.size(key) is None)
    if missing:
        raise ValueError(
            f"the checkpoint must have all else that the model's state dict has, but lacks "
            f"{missing}; set `model_key` to the name under which it was saved"
        )
    return others


def _fill(job: _Job, named: _Named, counts: Mapping[str, IdCounts], progress: Any) -> None:
    filler = None
    if job.kernel is not None:
        layouts = job.kernel.table_layouts()
        filler = GroupFiller(job.kernel.bags, layouts)
        filler.clear()
        counted, total = {}, 0.0
        for layout in layouts:
            if layout.index >= 0 and layout.name in counts:
                of_table = counts[layout.name]
                total += float(of_table.counts.sum())
                begin, end = _id_range(job, layout.name)
                mixed = _mixed(of_table.ids, layout.num_ids)
                mine = (mixed >= begin) & (mixed < end)
                counted[layout.name] = Counted(mixed[mine] - begin, of_table.counts[mine])
        filler.choose_hot(counted, total)
    for table in job.group.tables:
        _fill_table(job, table, filler, named, counts.get(table.name), progress)


def _mixed(ids: Tensor, num_ids: int) -> Tensor:
    starts = torch.tensor([0, len(ids)])
    return mix_ids(ids, starts, torch.tensor([num_ids]), torch.zeros(1, dtype=torch.int64))


def _id_range(job: _Job, name: str) -> tuple[int, int]:
    """The mixed ids of a table that this rank owns."""
    if job.kernel is None:
        return 0, 0
    (layout,) = (layout for layout in job.kernel.table_layouts() if layout.name == name)
    last = layout.first_row + layout.num_rows
    return (
        first_mixed_id(layout.first_row, layout.num_ids, layout.shared_rows),
        first_mixed_id(last, layout.num_ids, layout.shared_rows),
    )


def _fill_table(  # noqa: PLR0913  a table, where it comes from, where it goes
    job: _Job,
    table: CompressedTable,
    filler: GroupFiller | None,
    named: _Named,
    counts: IdCounts | None,
    progress: Any,
) -> None:
    keys = named.keys(job, table)
    ranks = process_group_of(job.module)
    exchange = _Exchange(ranks, _id_range(job, table.name))
    columns = sum(max(1, (named.source.size(key) or torch.Size([0]))[1:].numel()) for key in keys)
    step = max(1, CHUNK_BYTES // (4 * columns))
    world_size, rank = dist.get_world_size(ranks), dist.get_rank(ranks)
    into = None if filler is None else filler.table(table.name)
    counts = counts or IdCounts.of(torch.empty(0, dtype=torch.int64))
    for first in range(0, table.num_ids, step * world_size):
        begin = min(table.num_ids, first + rank * step)
        end = min(table.num_ids, begin + step)
        values = named.values(keys, table, begin, end)
        mixed = _mixed(torch.arange(begin, end), table.num_ids)
        ids, values, weights = exchange(mixed, values, counts.weights(begin, end))
        if into is not None and filler is not None:
            device = filler.device
            into.add(ids.to(device), values.to(device), weights.to(device))
        progress.update(min(table.num_ids, first + step * world_size) - first)
    if into is not None:
        into.finish()


class _Exchange:
    """Sends rows to the ranks that own their ids.

    Args:
        ranks: all that read or own rows of a table.
        owned: first mixed id of this rank, and the one after its last.
    """

    def __init__(self, ranks: dist.ProcessGroup, owned: tuple[int, int]) -> None:
        """Learn who owns what; see the class."""
        everyone: list[Any] = [None] * dist.get_world_size(ranks)
        dist.all_gather_object(everyone, owned, group=ranks)
        self._ranks = ranks
        self._first = owned[0]
        owners = sorted((begin, rank) for rank, (begin, end) in enumerate(everyone) if begin < end)
        self._begins = torch.tensor([begin for begin, _ in owners])
        self._owners = torch.tensor([rank for _, rank in owners])
        on_gpu = dist.get_backend(ranks) == "nccl"
        self._device = torch.device("cuda" if on_gpu else "cpu")

    def __call__(
        self, mixed: Tensor, values: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange rows; every rank has to call it.

        Args:
            mixed: int64 ``[N]``, mixed ids.
            values: float32 ``[N, C]``.
            weights: float64 ``[N]``.

        Returns:
            The same of the ids that this rank owns, less the first of them, in an order that
            follows from the arguments of all ranks.
        """
        if dist.get_world_size(self._ranks) == 1:
            return mixed - self._first, values, weights
        owner = self._owners[torch.searchsorted(self._begins, mixed, right=True) - 1]
        order = owner.argsort(stable=True)
        sent = torch.bincount(owner, minlength=dist.get_world_size(self._ranks))
        received = torch.empty_like(sent, device=self._device)
        dist.all_to_all_single(received, sent.to(self._device), group=self._ranks)
        sizes = received.tolist(), sent.tolist()
        sorted_ = (tensor.index_select(0, order) for tensor in (mixed, values, weights))
        mixed, values, weights = (self._send(tensor, sizes) for tensor in sorted_)
        return mixed - self._first, values, weights

    def _send(self, tensor: Tensor, sizes: tuple[list[int], list[int]]) -> Tensor:
        into, out = sizes
        received = torch.empty(
            (sum(into), *tensor.shape[1:]), dtype=tensor.dtype, device=self._device
        )
        dist.all_to_all_single(received, tensor.to(self._device), into, out, group=self._ranks)
        return received
