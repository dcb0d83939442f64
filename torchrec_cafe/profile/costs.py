"""What each way of keeping a table costs and catches, from the statistics of its ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchrec_cafe.config import Cafe, IdStatistics, Lookahead, TableShape


@dataclass(frozen=True)
class Owning:
    """What Cafe gives a table at one compression.

    Attributes:
        share: of the lookups, in [0, 1], that go to ids with a row of their own.
        rows: rows that ids own: of the pool's hot rows as many as the table's ids earn, or all.
        is_whole: whether the table is kept whole.
    """

    share: float
    rows: float
    is_whole: bool


@dataclass(frozen=True)
class CompressionCost:
    """Cafe at one compression.

    Attributes:
        compression: dense bytes over resident bytes.
        resident_bytes: of all tables; 0 if refused.
        owning: by table; empty if refused.
        refused: why a group of tables cannot be compressed so far.
    """

    compression: float
    resident_bytes: int
    owning: Mapping[str, Owning]
    refused: str = ""


@dataclass(frozen=True)
class CacheCost:
    """A cache of one size for one table.

    Attributes:
        label: the size as it was asked for.
        rows: of the cache, at most the table's.
        num_bytes: of its rows and its map.
        lru: predicted hit rate of FBGEMM's cache, in [0, 1].
        lookahead: the same of a look-ahead table; ``None``: too few slots for the largest batch.
    """

    label: str
    rows: int
    num_bytes: int
    lru: float
    lookahead: float | None


def compression_cost(
    statistics: Mapping[str, IdStatistics], shapes: Mapping[str, TableShape], compression: float
) -> CompressionCost:
    """Divide the budget as :class:`~torchrec_cafe.Cafe` does, and give the hot rows to ids.

    Tables of equal dim and dtype share a pool, whose rows go to the ids with the most lookups: what
    a sketch that makes no mistakes would do with an importance that is equal for all occurrences,
    as normalised gradient norms are on average.

    Args:
        statistics: by table.
        shapes: by table.
        compression: >= 1.

    Raises:
        ValueError: if the compression is no such number; one that is too large for the tables is
            :attr:`CompressionCost.refused`.
    """
    kind = Cafe(compression=compression)
    groups: dict[tuple[int, int], list[TableShape]] = {}
    for name in statistics:
        shape = shapes[name]
        groups.setdefault((shape.embedding_dim, shape.item_bytes), []).append(shape)
    owning: dict[str, Owning] = {}
    resident = 0
    for tables in groups.values():
        try:
            allocation = kind.allocate(tables)
        except ValueError as error:
            return CompressionCost(compression, 0, {}, str(error))
        resident += allocation.memory.total_bytes
        hot_rows = allocation.num_shards * allocation.hot_rows_per_shard
        pool = {name: statistics[name] for name in allocation.tracked}
        rows = split_hot_rows(pool, hot_rows)
        for table in tables:
            if table.name in rows:
                share = statistics[table.name].share_owning(rows[table.name])
                owning[table.name] = Owning(share, rows[table.name], is_whole=False)
            else:
                owning[table.name] = Owning(1.0, table.num_embeddings, is_whole=True)
    return CompressionCost(compression, resident, {name: owning[name] for name in statistics})


def split_hot_rows(statistics: Mapping[str, IdStatistics], hot_rows: int) -> dict[str, float]:
    """Give rows to the most frequent ids of tables that share them.

    Args:
        statistics: by table.
        hot_rows: of all tables.

    Returns:
        Rows of each table.
    """
    steps: list[tuple[float, str, float]] = []  # lookups per row, table, rows
    for name, table in statistics.items():
        points = [(0, 0.0), *table.coverage]
        for (rows, share), (next_rows, next_share) in zip(points, points[1:], strict=False):
            gain = (next_share - share) * table.num_lookups / (next_rows - rows)
            steps.append((gain, name, float(next_rows - rows)))
    given = dict.fromkeys(statistics, 0.0)
    left = float(hot_rows)
    for _, name, rows in sorted(steps, key=lambda step: -step[0]):
        taken = min(rows, left)
        given[name] += taken
        left -= taken
    return given


def cache_cost(statistics: IdStatistics, shape: TableShape, size: str) -> CacheCost:
    """What a cache of a table holds.

    Args:
        statistics: of the table.
        shape: of the table.
        size: as :func:`parse_cache_size` takes it.
    """
    rows = parse_cache_size(size, shape.num_embeddings)
    memory = Lookahead(
        cache_fraction=rows / shape.num_embeddings, min_slots=rows
    ).allocate([shape]).memory  # fmt: skip
    smallest = statistics.lookahead_hits[0][0] if statistics.lookahead_hits else 0
    whole = rows == shape.num_embeddings
    fits = rows >= smallest or whole
    return CacheCost(
        label=size,
        rows=rows,
        num_bytes=memory.total_bytes,
        lru=statistics.lru_hit_rate(rows),
        lookahead=statistics.lookahead_hit_rate(max(rows, smallest)) if fits else None,
    )


def parse_cache_size(size: str, num_embeddings: int) -> int:
    """Rows of a cache.

    Args:
        size: ``5%`` or ``0.05``, a share of the table's rows in (0, 1], or ``20000``, rows.
        num_embeddings: rows of the table.

    Returns:
        In [1, ``num_embeddings``].

    Raises:
        ValueError: if it is none of these.
    """
    try:
        if size.endswith("%") or "." in size:
            share = float(size.removesuffix("%")) / (100 if size.endswith("%") else 1)
            if 0 < share <= 1:
                return max(1, round(share * num_embeddings))
        elif int(size) >= 1:
            return min(int(size), num_embeddings)
    except ValueError:
        pass
    raise ValueError(
        f"a cache size must be a share in (0, 1] (5% or 0.05) or rows >= 1, got {size!r}"
    )


def shapes_of(
    largest_ids: Mapping[str, int],
    num_embeddings: Mapping[str, int],
    dims: Mapping[str, int],
    item_bytes: Mapping[str, int],
) -> dict[str, TableShape]:
    """The tables: as many rows as is said, or as the largest id needs.

    Args:
        largest_ids: by table, as seen.
        num_embeddings: by table; those that are missing follow from the largest id.
        dims: by table.
        item_bytes: by table.

    Raises:
        ValueError: if an id is not below its table's rows.
    """
    shapes = {}
    for name, largest in largest_ids.items():
        rows = num_embeddings.get(name, largest + 1)
        if largest >= rows:
            raise ValueError(
                f"table {name!r}: ids must be below num_embeddings={rows}, got {largest}"
            )
        shapes[name] = TableShape(
            name=name,
            num_embeddings=rows,
            embedding_dim=dims[name],
            item_bytes=item_bytes[name],
        )
    return shapes


def column_of(costs: Sequence[CompressionCost], name: str) -> list[Owning | None]:
    """What each compression gives a table; ``None`` where it is refused."""
    return [cost.owning.get(name) for cost in costs]
