"""The rows of a pool: who moves into them, and who looks up two.

Shape legend: N occurrences, S virtual shards, W buckets and H hot rows a shard, R physical rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error
from torchrec_cafe.ops.row_map import TABLE_COLUMNS, PoolRows, Remapped, check_bags


class Lookups(NamedTuple):
    """Rows of a batch's bags, of which an occurrence may have several.

    Attributes:
        rows: int64 ``[M]``, physical rows.
        offsets: int64 ``[B * F + 1]``, where each bag starts in ``rows``.
        source: int32 ``[M]``, position in the batch's ids that each row came from.
    """

    rows: Tensor
    offsets: Tensor
    source: Tensor


class Moves(NamedTuple):
    """What :func:`rebalance` says to do to the hot rows of some shards.

    Attributes:
        selected: int64 ``[n]``, the shards.
        actions: int8 ``[n, H]``, of each of their hot rows.
        new_keys: int64 ``[n, H]``, the key that a row to fill now belongs to.
    """

    selected: Tensor
    actions: Tensor
    new_keys: Tensor


def move_rows(
    rows: Tensor, moves: Moves, tables: Tensor, pool: PoolRows, *, second_factor: float
) -> None:
    """Fill the hot rows that have a new owner, and clear those that have lost theirs.

    A new owner's row becomes the shared row that it was trained on or, if the id was medium,
    ``second_factor`` times the sum of its shared and its second row.

    Args:
        rows: float32, float16 or bfloat16 ``[R, ...]``, contiguous: weights or a row-wise optimizer
            state; mutated.
        moves: what :func:`rebalance` returned.
        tables: int64 ``[T, 5]``, as :func:`remap` takes them, one row per table of the pool, in the
            order of ``index``.
        pool: where the hot rows lie.
        second_factor: 1 for weights, which are looked up as a sum; .5 for a state, so that it is
            the mean of the two rows'.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, the devices differ, or a row that moves is not
            in ``rows``; nothing is mutated then. On CUDA the last cannot be seen without waiting
            for the device, and such a row stays as it is.

    Note:
        Deterministic. No host synchronisation. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.3; medium ids: section 3.4.
    """
    try:
        torch.ops.torchrec_cafe.move_rows.default(
            rows,
            moves.actions,
            moves.new_keys,
            moves.selected,
            tables,
            pool.rows_per_shard,
            pool.offset,
            second_factor,
        )
    except RuntimeError as error:
        if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                "move_rows: `rows` must be torch.float32, torch.float16 or torch.bfloat16, got "
                f"{rows.dtype}"
            ) from None
        check_tensor("move_rows", "rows", rows, rows.dtype, (None,) * max(1, rows.dim()))
        count = moves.selected.numel()
        check_tensor("move_rows", "moves.selected", moves.selected, torch.int64, (None,))
        check_tensor("move_rows", "moves.actions", moves.actions, torch.int8, (count, None))
        shape = tuple(moves.actions.shape)
        check_tensor("move_rows", "moves.new_keys", moves.new_keys, torch.int64, shape)
        check_tensor("move_rows", "tables", tables, torch.int64, (None, len(TABLE_COLUMNS)))
        check_same_device("move_rows", rows=rows, actions=moves.actions, tables=tables)
        raise value_error("move_rows", error) from None


def add_second_rows(batch: Remapped, pool: PoolRows) -> Lookups:
    """Let each medium id look up a second row after its shared row: its bag sums the two.

    Args:
        batch: what :func:`remap` made of the batch; fewer than 2**30 ids.
        pool: where the second rows lie.

    Returns:
        The rows; they say where they came from if the batch does.

    Raises:
        TypeError: if a dtype is not the one of :class:`Remapped`.
        ValueError: if a shape is not the one there, the devices differ, or ``offsets`` does not
            ascend from 0 to the number of rows; the last cannot be seen on CUDA, where no memory
            outside the arguments is read.

    Note:
        Deterministic. Nothing is mutated. Not differentiable. On CUDA it waits for the device once,
        to learn how many rows there are.

    Reference: CAFE (SIGMOD 2024), section 3.4 (multi-level hash embedding).
    """
    try:
        return Lookups._make(
            torch.ops.torchrec_cafe.add_second_rows.default(
                batch.rows, batch.offsets, batch.source, batch.second, pool.offset
            )
        )
    except RuntimeError as error:
        op, size = "add_second_rows", tuple(batch.rows.shape)
        check_tensor(op, "batch.rows", batch.rows, torch.int64, (None,))
        check_tensor(op, "batch.second", batch.second, torch.int32, size)
        check_tensor(op, "batch.offsets", batch.offsets, torch.int64, (None,))
        sources = size if batch.source.numel() else (0,)
        check_tensor(op, "batch.source", batch.source, torch.int32, sources)
        check_same_device(
            op,
            rows=batch.rows,
            offsets=batch.offsets,
            source=batch.source,
            second=batch.second,
        )
        raise value_error(op, error) from None


def quotient_remainder(ids: Tensor, offsets: Tensor, tables: Tensor) -> Lookups:
    """Turn ids into two rows each, which no other id of their table has both of.

    A mixed id ``m`` of a table of ``n`` ids has row ``m % r`` of its ``r`` remainder rows, and row
    ``m // r`` of the ``ceil(n / r)`` quotient rows after them; its bag sums the two.

    Args:
        ids: int64 ``[N]``, mixed ids less the table's ``first_id``, feature-major; N < 2**30.
        offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
        tables: int64 ``[F, 5]``, as :func:`remap` takes them, with ``shared_rows`` the remainder
            rows; ``index`` is not used.

    Returns:
        The rows, sample-major: bag ``b * F + f`` is sample b of feature f.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, the devices differ, or ``offsets`` does not
            ascend from 0 to N; the last cannot be seen on CUDA.

    Note:
        Deterministic, and the same on every device. Nothing is mutated. Not differentiable.

    Reference: Shi et al., Compositional Embeddings Using Complementary Partitions (KDD 2020).
    """
    try:
        return Lookups._make(
            torch.ops.torchrec_cafe.quotient_remainder.default(ids, offsets, tables)
        )
    except RuntimeError as error:
        check_bags("quotient_remainder", ids, offsets, tables)
        raise value_error("quotient_remainder", error) from None


@torch.library.register_fake("torchrec_cafe::move_rows")
def _(  # noqa: PLR0913  the schema has as many arguments
    rows: Tensor,
    actions: Tensor,
    new_keys: Tensor,
    selected: Tensor,
    tables: Tensor,
    rows_per_shard: int,
    hot_offset: int,
    second_factor: float,
) -> None:
    check_same_device("move_rows", rows=rows, actions=actions, tables=tables)


@torch.library.register_fake("torchrec_cafe::add_second_rows")
def _(
    rows: Tensor, offsets: Tensor, source: Tensor, second: Tensor, hot_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device("add_second_rows", rows=rows, offsets=offsets, source=source, second=second)
    size = torch.library.get_ctx().new_dynamic_size()
    sources = size if source.shape[0] else 0
    return rows.new_empty(size), torch.empty_like(offsets), source.new_empty(sources)


@torch.library.register_fake("torchrec_cafe::quotient_remainder")
def _(ids: Tensor, offsets: Tensor, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device("quotient_remainder", ids=ids, offsets=offsets, tables=tables)
    size = 2 * ids.shape[0]
    rows = ids.new_empty(size)
    return rows, torch.empty_like(offsets), ids.new_empty(size, dtype=torch.int32)
