"""Bytes: of a table, of a group of tables, and of what the sketch keeps. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: Bytes of a slot of HotSketch: int64 key, float32 score, int32 hot row.
SLOT_BYTES = 16
#: Slots of a bucket of HotSketch; a bucket is one 64-byte cache line.
BUCKET_SLOTS = 4
#: Bytes of the map from a hot row to the slot that owns it.
OWNER_BYTES = 4
#: Bytes a shard keeps besides its slots: inflation (8), counters (6 x 8).
SHARD_BYTES = 56
#: Bytes a shard keeps per table of its pool: running sum and count of the importance.
TABLE_STATISTICS_BYTES = 16
#: Most hash functions of an encoding.
MAX_HASHES = 16
#: Bytes of a weight: float32 for tables of any dtype.
WEIGHT_BYTES = 4
#: Weights of MEM-REC that share a row of FBGEMM, and that row's optimizer state.
WEIGHTS_PER_ROW = 4
#: The same of the factors of Cafe: a line has all weights of an id.
WEIGHTS_PER_LINE = 16
#: Bytes of a look-ahead table's map per slot: two entries and two uses of its queue, the slot's row
#: and state, and its place in the stack of free slots.
SLOT_MAP_BYTES = 2 * (24 + 16) + 16 + 4
#: Tables of a pool need fewer rows than this, so that (table, id) fits one 64-bit key.
MAX_NUM_EMBEDDINGS = 2**47

_ITEM_BYTES = MappingProxyType({"float32": 4, "fp32": 4, "float16": 2, "fp16": 2})


@dataclass(frozen=True)
class MemoryBreakdown:
    """What a table or a group of tables keeps resident, in bytes.

    Attributes:
        shared_bytes: rows that ids share, second rows, and rows of tables kept whole; token rows
            and weights.
        hot_bytes: rows that hot ids own; slots of look-ahead tables.
        sketch_bytes: slots and statistics of HotSketch.
        map_bytes: map from hot rows to their owners, or from rows to slots.
        dense_bytes: the uncompressed table, for comparison.
        backing_bytes: rows of look-ahead tables in host memory or a file, not part of the sum.
    """

    shared_bytes: int
    hot_bytes: int
    sketch_bytes: int
    map_bytes: int
    dense_bytes: int
    backing_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything that must be resident for lookups."""
        return self.shared_bytes + self.hot_bytes + self.sketch_bytes + self.map_bytes

    @property
    def compression(self) -> float:
        """``dense_bytes / total_bytes``."""
        return self.dense_bytes / self.total_bytes


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """An uncompressed table.

    Attributes:
        name: name of the table.
        num_embeddings: its rows, in [1, 2**47).
        embedding_dim: its columns, a positive multiple of 4.
        item_bytes: bytes of one weight, 4 or 2.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    item_bytes: int = 4

    def __post_init__(self) -> None:
        """Check the shape.

        Raises:
            ValueError: if a size is out of range.
        """
        if not 1 <= self.num_embeddings < MAX_NUM_EMBEDDINGS:
            raise ValueError(
                f"table {self.name!r}: num_embeddings must be in [1, 2**47), "
                f"got {self.num_embeddings}"
            )
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            nearest = max(4, 4 * round(self.embedding_dim / 4))
            raise ValueError(
                f"table {self.name!r}: embedding_dim must be a positive multiple of 4 "
                f"(FBGEMM's row alignment), got {self.embedding_dim}; use {nearest}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.embedding_dim * self.item_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_embeddings * self.row_bytes


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The rows that a group of tables of one kind gets.

    Attributes:
        shared_rows: per table, the rows its ids share; equal to ``num_embeddings`` if kept whole,
            0 if all its rows are in a pool.
        num_shards: virtual shards of the pool of hot rows; 0 without a pool.
        hot_rows_per_shard: hot rows of a virtual shard.
        second_rows_per_shard: rows of a virtual shard that medium ids add to their shared row.
        buckets_per_shard: buckets of HotSketch of a virtual shard.
        token_rows_per_shard: rows of a virtual shard of MEM-REC's token table.
        weights_per_shard: weights of a virtual shard.
        num_slots: slots of look-ahead tables, over all ranks; 0 for other kinds.
        tracked: tables whose ids have rows in the pool, in the order of their numbers in it.
        memory: what the group costs.
    """

    shared_rows: Mapping[str, int]
    memory: MemoryBreakdown
    num_shards: int = 0
    hot_rows_per_shard: int = 0
    second_rows_per_shard: int = 0
    buckets_per_shard: int = 0
    token_rows_per_shard: int = 0
    weights_per_shard: int = 0
    num_slots: int = 0
    tracked: tuple[str, ...] = ()


def whole_weights(rows: int, per_row: int) -> int:
    """As many weights as rows, in whole rows of so many weights, at least one."""
    return max(1, rows // per_row) * per_row


def item_bytes(dtype: object) -> int:
    """Bytes of one weight.

    Args:
        dtype: ``"float32"``, ``"float16"``, ``torch.float32``, ``torch.float16``, or TorchRec's
            ``DataType.FP32``, ``DataType.FP16``.

    Raises:
        ValueError: for any other dtype.
    """
    name = str(getattr(dtype, "value", dtype)).removeprefix("torch.").lower()
    if name not in _ITEM_BYTES:
        raise ValueError(f"dtype must be float32 or float16, got {dtype}")
    return _ITEM_BYTES[name]
