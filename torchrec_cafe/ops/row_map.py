"""From ids to physical rows.

Shape legend: N ids, F features, B samples, S virtual shards held by this rank, T tables of a pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error

#: Columns of the ``tables`` argument of :func:`remap`.
TABLE_COLUMNS = ("num_ids", "shared_rows", "first_id", "row_offset", "index")
#: Bits of a key that are the mixed id; those above are the number of the table in its pool.
ID_BITS = 48


class Remapped(NamedTuple):
    """A batch in physical rows.

    Rows are sample-major: bag ``b * F + f`` is sample b of feature f. Keys and shards, which the
    sketch learns from, are in the order of the ids as they came.

    Attributes:
        rows: int64 ``[N]``, physical row of each occurrence.
        offsets: int64 ``[B * F + 1]``, where each bag starts in ``rows``.
        source: int32 ``[N]``, position in ``ids`` that each of ``rows`` came from; ``[0]`` if it
            was not asked for.
        keys: int64 ``[N]``, key of each id in the sketch, 0 where its table is not tracked; ``[0]``
            without hot rows.
        shards: int32 ``[N]``, virtual shard of each id on this rank, -1 where it is not tracked;
            ``[0]`` without hot rows.
        second: int32 ``[N]``, besides each of ``rows``, the second row of an id that is medium,
            counted from the first row of the pool, or -1; ``[0]`` without second rows.
        cold_shards: int32 ``[N]``, as ``shards``, but -1 also for an id that owns a row; ``[0]``
            without hot rows, or if ``source`` was not asked for.
    """

    rows: Tensor
    offsets: Tensor
    source: Tensor
    keys: Tensor
    shards: Tensor
    second: Tensor
    cold_shards: Tensor


def mix_ids(
    ids: Tensor, feature_offsets: Tensor, num_embeddings: Tensor, out_of_range: Tensor
) -> Tensor:
    """Apply to each feature's ids a fixed bijection of ``[0, num_embeddings)``.

    Ids sorted by frequency are the norm: without mixing, a contiguous range of them would put
    every popular id on one rank and into one shared row.

    Args:
        ids: int64 ``[N]``, feature after feature.
        feature_offsets: int64 ``[F + 1]``, where each feature's ids start; ascending from 0 to N.
        num_embeddings: int64 ``[F]``, rows of the feature's table; 0 leaves its ids alone.
        out_of_range: int64 ``[F]``, mutated: how many ids were outside ``[0, num_embeddings)`` is
            added to it. They are taken as id 0, as FBGEMM's bounds check does.

    Returns:
        int64 ``[N]``, mixed ids.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or the devices differ.

    Note:
        Deterministic, and the same on every device. Not differentiable.
    """
    try:
        return torch.ops.torchrec_cafe.mix_ids.default(
            ids, feature_offsets, num_embeddings, out_of_range
        )
    except RuntimeError as error:
        features = num_embeddings.numel()
        check_tensor("mix_ids", "ids", ids, torch.int64, (None,))
        check_tensor("mix_ids", "num_embeddings", num_embeddings, torch.int64, (None,))
        check_tensor("mix_ids", "feature_offsets", feature_offsets, torch.int64, (features + 1,))
        check_tensor("mix_ids", "out_of_range", out_of_range, torch.int64, (features,))
        check_same_device(
            "mix_ids",
            ids=ids,
            feature_offsets=feature_offsets,
            num_embeddings=num_embeddings,
            out_of_range=out_of_range,
        )
        raise value_error("mix_ids", error) from None


# Sums of row numbers then fit an operator's int64.
_MAX_ROWS = 2**48


@dataclass(frozen=True, kw_only=True)
class PoolRows:
    """Where the rows of a pool lie: shard after shard, in each the hot rows before second rows.

    Attributes:
        offset: physical row of the first, in [0, 2**48).
        hot_rows_per_shard: rows of a shard that ids own, in [0, 2**48).
        second_rows_per_shard: rows of a shard that medium ids add to their shared row, likewise.

    Raises:
        ValueError: if a number is out of range.
    """

    offset: int
    hot_rows_per_shard: int
    second_rows_per_shard: int = 0

    def __post_init__(self) -> None:
        """Check the numbers; see the class."""
        for name in ("offset", "hot_rows_per_shard", "second_rows_per_shard"):
            if not 0 <= getattr(self, name) < _MAX_ROWS:
                raise ValueError(
                    f"PoolRows: `{name}` must be in [0, 2**48), got {getattr(self, name)}"
                )

    @property
    def rows_per_shard(self) -> int:
        """Rows of a virtual shard."""
        return self.hot_rows_per_shard + self.second_rows_per_shard


@dataclass(frozen=True, kw_only=True)
class HotRows:
    """Where :func:`remap` finds the ids that own a row, and those that have two.

    Attributes:
        buckets: int64 ``[S, W, 8]``, of the sketch.
        first_shard: global number of this rank's first virtual shard, >= 0.
        num_shards: virtual shards over all ranks, in [0, 65536].
        rows: where the rows lie.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above.
    """

    buckets: Tensor
    first_shard: int
    num_shards: int
    rows: PoolRows

    def __post_init__(self) -> None:
        """Check the arguments; see the class."""
        check_tensor("HotRows", "buckets", self.buckets, torch.int64, (None, None, 8))
        if not 0 <= self.num_shards <= 65536:
            raise ValueError(f"HotRows: `num_shards` must be in [0, 65536], got {self.num_shards}")
        if self.first_shard < 0:
            raise ValueError(f"HotRows: `first_shard` must be >= 0, got {self.first_shard}")

    @classmethod
    def none(cls, device: torch.device | None = None) -> HotRows:
        """No id owns a row."""
        return cls(
            buckets=torch.zeros((0, 0, 8), dtype=torch.int64, device=device),
            first_shard=0,
            num_shards=0,
            rows=PoolRows(offset=0, hot_rows_per_shard=0),
        )


def remap(
    ids: Tensor, offsets: Tensor, tables: Tensor, hot: HotRows, *, with_source: bool = True
) -> Remapped:
    """Turn the ids of a whole group of tables into physical rows of one table.

    A mixed id ``m`` of a table of ``n`` ids and ``r`` shared rows has the shared row
    ``m * r // n``; if the sketch says that it is hot, it has its own row instead.

    Args:
        ids: int64 ``[N]``, mixed ids less the table's ``first_id``, feature-major; N < 2**31.
        offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
        tables: int64 ``[F, 5]``, the columns of :data:`TABLE_COLUMNS`: ids of the table, in
            [1, 2**47); rows they share, in [1, ids]; mixed id of local id 0; physical row of shared
            row 0; number of the table in its pool, in [0, 2**15), or -1 if its ids are never hot.
        hot: where the ids that own a row are found.
        with_source: whether to say which id each row came from, and which ids own none.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, the devices differ, or ``offsets`` does not
            ascend from 0 to N. On CUDA the last cannot be seen without waiting for the device: no
            memory outside the arguments is touched, and the rows of such a batch mean nothing.

    Note:
        Deterministic, and the same on every device. Nothing is mutated. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.1.
    """
    try:
        return Remapped._make(
            torch.ops.torchrec_cafe.remap.default(
                ids,
                offsets,
                tables,
                hot.buckets,
                hot.first_shard,
                hot.num_shards,
                hot.rows.hot_rows_per_shard,
                hot.rows.rows_per_shard,
                hot.rows.offset,
                with_source,
            )
        )
    except RuntimeError as error:
        check_bags("remap", ids, offsets, tables, buckets=hot.buckets)
        raise value_error("remap", error) from None


def check_bags(op: str, ids: Tensor, offsets: Tensor, tables: Tensor, **others: Tensor) -> None:
    """Check the bags of a group of tables.

    Args:
        op: operator, for the message.
        ids: as :func:`remap` takes them.
        offsets: as :func:`remap` takes them.
        tables: as :func:`remap` takes them.
        others: further arguments that must be on their device.

    Raises:
        TypeError: if a dtype is not the one that :func:`remap` names.
        ValueError: if a shape is not, or the devices differ.
    """
    check_tensor(op, "ids", ids, torch.int64, (None,))
    check_tensor(op, "tables", tables, torch.int64, (None, len(TABLE_COLUMNS)))
    check_tensor(op, "offsets", offsets, torch.int64, (None,))
    check_same_device(op, ids=ids, offsets=offsets, tables=tables, **others)
    features = tables.shape[0]
    if features == 0 or offsets.numel() == 0 or (offsets.numel() - 1) % features:
        raise ValueError(
            f"{op}: `offsets` must have features * batch + 1 elements, got {offsets.numel()} "
            f"for {features} features"
        )


def first_mixed_id(shared_row: int, num_ids: int, shared_rows: int) -> int:
    """The smallest mixed id whose shared row is at least ``shared_row``."""
    return -(-shared_row * num_ids // shared_rows)


@torch.library.register_fake("torchrec_cafe::mix_ids")
def _(ids: Tensor, feature_offsets: Tensor, num_embeddings: Tensor, out_of_range: Tensor) -> Tensor:
    return torch.empty_like(ids)


@torch.library.register_fake("torchrec_cafe::remap")
def _(  # noqa: PLR0913  the schema has as many arguments
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    buckets: Tensor,
    first_shard: int,
    num_shards: int,
    hot_rows_per_shard: int,
    rows_per_shard: int,
    hot_offset: int,
    with_source: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_same_device("remap", ids=ids, offsets=offsets, tables=tables, buckets=buckets)
    tracked = ids.shape[0] if num_shards > 0 else 0
    return (
        torch.empty_like(ids),
        torch.empty_like(offsets),
        ids.new_empty(ids.shape[0] if with_source else 0, dtype=torch.int32),
        ids.new_empty(tracked),
        ids.new_empty(tracked, dtype=torch.int32),
        ids.new_empty(tracked if rows_per_shard > hot_rows_per_shard else 0, dtype=torch.int32),
        ids.new_empty(tracked if with_source else 0, dtype=torch.int32),
    )
