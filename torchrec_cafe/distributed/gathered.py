"""The tables of a sharded module in one place: their parts, brought together from all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_cafe.config import Cafe, Lookahead, MemRec, QuotientRemainder, remainder_rows
from torchrec_cafe.distributed._torchrec import kernels_of, process_group_of
from torchrec_cafe.distributed.data_parallel import DenseMemRecEmbeddingBag
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag, mem_rec_layout
from torchrec_cafe.distributed.sharded_collection import ShardedCompressedCollection
from torchrec_cafe.distributed.types import CompressedGroup
from torchrec_cafe.ops import PoolRows
from torchrec_cafe.tables import TableLayout
from torchrec_cafe.tables.touched import of_lookups
from torchrec_cafe.tables.view import GroupLayout, GroupView, TableView

# Of the state that a checkpoint holds, what lookups need.
_LOOKUP_STATE = ("sketch_buckets", "weight_table")


@dataclass(frozen=True)
class Part:
    """A rank's part of a tensor.

    Attributes:
        name: of the tensor.
        offsets: where it lies in the whole.
        tensor: the part.
    """

    name: str
    offsets: tuple[int, ...]
    tensor: Tensor


def gather(
    parts: Sequence[Part], group: dist.ProcessGroup, *, to: int | None = None
) -> dict[str, Tensor]:
    """Bring the parts of tensors together; every rank of the group has to call it.

    Args:
        parts: this rank's. Parts that several ranks have are taken from the first.
        group: the ranks.
        to: rank of the group that gets the tensors; ``None``: all do.

    Returns:
        The tensors by name, on the CPU; empty on ranks that get nothing.
    """
    mine = [(p.name, p.offsets, tuple(p.tensor.shape), p.tensor.dtype) for p in parts]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    rank = dist.get_rank(group)
    wanted = to is None or to == rank
    whole = _allocate(everyone) if wanted else {}
    seen = set()
    for owner, described in enumerate(everyone):
        for number, (name, offsets, shape, dtype) in enumerate(described):
            if (name, offsets) in seen or 0 in shape:
                continue
            seen.add((name, offsets))
            tensor = None
            if owner == rank:
                tensor = parts[number].tensor.detach().contiguous()
            if to != owner and dist.get_world_size(group) > 1:
                tensor = _send(tensor, shape, dtype, owner, to, group)
            if wanted:
                assert tensor is not None
                at = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
                whole[name][at] = tensor.cpu()
    return whole


def _send(
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    owner: int,
    to: int | None,
    group: dist.ProcessGroup,
) -> Tensor | None:
    """A part on the ranks that want it."""
    rank = dist.get_rank(group)
    if to is not None and rank not in (owner, to):
        return None
    if tensor is None:
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        tensor = torch.empty(shape, dtype=dtype, device=device)
    if to is None:
        dist.broadcast(tensor, group=group, group_src=owner)
    elif rank == owner:
        dist.send(tensor, group=group, group_dst=to)
    else:
        dist.recv(tensor, group=group, group_src=owner)
    return tensor


def _allocate(everyone: list[Any]) -> dict[str, Tensor]:
    """Tensors that hold all parts."""
    sizes: dict[str, tuple[list[int], torch.dtype]] = {}
    for name, offsets, shape, dtype in (part for described in everyone for part in described):
        ends = [o + s for o, s in zip(offsets, shape, strict=True)]
        size = sizes.setdefault(name, ([0] * len(shape), dtype))[0]
        size[:] = [max(pair) for pair in zip(size, ends, strict=True)]
    return {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes.items()}


def gather_concat(tensor: Tensor, group: dist.ProcessGroup, *, to: int | None = None) -> Tensor:
    """The tensors of all ranks, one after the other; every rank of the group has to call it.

    Args:
        tensor: ``[n, ...]``, of any ``n`` on each rank.
        group: the ranks.
        to: rank of the group that gets them; ``None``: all do.

    Returns:
        On the CPU; ``[0, ...]`` on ranks that get nothing.
    """
    sizes: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(sizes, len(tensor), group=group)
    first = sum(sizes[: dist.get_rank(group)])
    part = Part("all", (first, *[0] * (tensor.dim() - 1)), tensor)
    return gather([part], group, to=to).get("all", tensor[:0].cpu())


def collections_with_kinds(
    model: nn.Module,
) -> Iterator[tuple[str, ShardedCompressedCollection]]:
    """The sharded collections of a model that have tables with a kind, by the prefix of their keys.

    Args:
        model: sharded by ``DistributedModelParallel``.
    """
    for name, module in get_unwrapped_module(model).named_modules():
        if isinstance(module, ShardedCompressedCollection):
            yield f"{name}.{module.tables_name}." if name else f"{module.tables_name}.", module


def compressed_groups(module: ShardedCompressedCollection) -> list[CompressedGroup]:
    """The groups of a collection whose tables are compressed, the same on every rank."""
    return [group for group in module.groups if not isinstance(group.kind, Lookahead)]


def gather_group(
    module: ShardedCompressedCollection, group: CompressedGroup, *, to: int | None
) -> GroupView | None:
    """A group in one place; every rank of the module has to call it.

    Args:
        module: the sharded collection. What the last step has taught is applied first.
        group: of :func:`compressed_groups`.
        to: rank that gets it; ``None``: all do.

    Returns:
        The view, ``None`` on ranks that do not get it.

    Raises:
        ValueError: if an id of a table has no vector of its own.
    """
    layout = group_layout(group)
    layout.check_vectors()
    gathered = gather(list(_parts(module, group, layout)), process_group_of(module), to=to)
    if not gathered:
        return None
    state = {name: gathered[name] for name in _LOOKUP_STATE if name in gathered}
    return GroupView(layout=layout, rows=gathered["rows"], state=state)


def gather_tables(model: nn.Module, *, rank: int | None = None) -> dict[str, TableView]:
    """The compressed tables of a model in one place, read-only; every rank has to call it.

    That takes what the kinds say is resident over all ranks, in host memory. Tables that are not
    compressed are left where they are.

    Args:
        model: sharded by ``DistributedModelParallel``. What the last step has taught is applied.
        rank: which rank gets them; ``None``: all do.

    Returns:
        By name of the table; empty on ranks that get none.

    Raises:
        ValueError: if an id of a table has no vector of its own, as in ``MemRec(per="sample")``.
    """
    tables = {}
    for _, module in collections_with_kinds(model):
        for group in compressed_groups(module):
            view = gather_group(module, group, to=rank)
            if view is None:
                continue
            for table in group.tables:
                tables[table.name] = TableView(view, table.name)
    return tables


def group_layout(group: CompressedGroup) -> GroupLayout:
    """Where the rows of a group lie once it is in one place."""
    kind, tables, row = group.kind, [], 0
    for table in group.tables:
        shared_rows = table.shared_rows
        if isinstance(kind, QuotientRemainder):
            shared_rows = remainder_rows(table.num_ids, table.shared_rows)
        tables.append(
            TableLayout(
                name=table.name,
                num_ids=table.num_ids,
                shared_rows=group.num_shards if isinstance(kind, MemRec) else shared_rows,
                first_row=0,
                num_rows=table.shared_rows,
                num_features=1,
                index=table.index,
            )
        )
        row += table.shared_rows
    mem_rec = None
    if isinstance(kind, MemRec):
        mem_rec = mem_rec_layout(group, 0, group.num_shards)
    has_hot_rows = isinstance(kind, Cafe) and group.has_pool
    return GroupLayout(
        kind=kind,
        tables=tuple(tables),
        pool=PoolRows(
            offset=row,
            hot_rows_per_shard=group.hot_rows_per_shard if has_hot_rows else 0,
            second_rows_per_shard=group.second_rows_per_shard if has_hot_rows else 0,
        ),
        mem_rec=mem_rec,
        num_rows=row + group.pool_rows,
    )


def first_rows(layout: GroupLayout, group: CompressedGroup) -> dict[str, int]:
    """The first physical row of each table, and of the pool by the name of the group."""
    first, row = {}, 0
    for table in layout.tables:
        first[table.name] = row
        row += table.num_rows
    return first | {group.name: layout.num_rows - group.pool_rows}


def _parts(
    module: ShardedCompressedCollection, group: CompressedGroup, layout: GroupLayout
) -> Iterator[Part]:
    """What this rank has of a group."""
    first = first_rows(layout, group)
    for kernel in kernels_of(module):
        if isinstance(kernel, DenseMemRecEmbeddingBag) and kernel.group == group:
            yield Part("rows", (first[group.name], 0), kernel.bags.token_rows)
            yield Part("weight_table", (0, 0), kernel.bags.weights)
        if not isinstance(kernel, CompressedEmbeddingBag) or kernel.group != group:
            continue
        kernel.flush()
        weights = kernel.split_embedding_weights()
        for table, rows in zip(kernel.config.embedding_tables, weights, strict=True):
            assert table.local_metadata is not None
            begin = first[table.name] + table.local_metadata.shard_offsets[0]
            yield Part("rows", (begin, 0), rows)
        if kernel.bags.state is None:
            continue
        tensors = kernel.bags.state.state_tensors()
        for name in _LOOKUP_STATE:
            if name in tensors:
                rest = (0,) * (tensors[name].dim() - 1)
                read = of_lookups(tensors[name]) if name == "sketch_buckets" else tensors[name]
                yield Part(name, (kernel.bags.state.first_shard, *rest), read)
