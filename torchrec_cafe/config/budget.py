"""How a budget of bytes is divided between the tables that share it. Standard library only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torchrec_cafe.config.memory import Allocation, MemoryBreakdown, TableShape, item_bytes


class TableKind(ABC):
    """How a table is kept. Kinds are frozen dataclasses: values, safe to share between tables."""

    def __str__(self) -> str:
        """What differs from the kind's defaults."""
        fields: Any = getattr(self, "__dataclass_fields__", {})
        given = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, field in fields.items()
            if (value := getattr(self, name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    @abstractmethod
    def allocate(self, tables: Sequence[TableShape]) -> Allocation:
        """Divide the budget of a group of tables.

        Args:
            tables: tables of equal dim and dtype that share the budget.

        Raises:
            ValueError: if the budget is too small, naming the largest compression that works.
        """

    def memory(self, num_embeddings: int, embedding_dim: int, dtype: object) -> MemoryBreakdown:
        """What one table costs on its own, before anything is run.

        Args:
            num_embeddings: rows of the uncompressed table.
            embedding_dim: its columns, a multiple of 4.
            dtype: float32 or float16, as a string, a ``torch.dtype`` or TorchRec's ``DataType``.

        Returns:
            Bytes of shared rows, hot rows, sketch and maps; their sum is at most the dense bytes
            divided by ``compression``.

        Raises:
            ValueError: if the compression leaves no row, naming the largest that works.
        """
        shape = TableShape(
            name="table",
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            item_bytes=item_bytes(dtype),
        )
        return self.allocate([shape]).memory


def check_compression(compression: float) -> None:
    """Raise a ``ValueError`` unless a compression is finite and at least 1."""
    if not (math.isfinite(compression) and compression >= 1):
        raise ValueError(f"compression must be a finite number >= 1, got {compression}")


def check_whole_fraction(whole_fraction: float) -> None:
    """Raise a ``ValueError`` unless a share is in [0, 1)."""
    if not 0 <= whole_fraction < 1:
        raise ValueError(f"whole_fraction must be in [0, 1), got {whole_fraction}")


def check_arguments(kind: TableKind, checks: Mapping[str, tuple[str, bool]]) -> None:
    """Raise a ``ValueError`` for the first argument of a kind that is out of range.

    Args:
        kind: the kind.
        checks: by argument, what it must be and whether it is.
    """
    for name, (wanted, holds) in checks.items():
        if not holds:
            raise ValueError(f"{name} must be {wanted}, got {getattr(kind, name)!r}")


def smallest(tables: Sequence[TableShape], available: int) -> set[str]:
    """The smallest tables whose rows fit ``available`` bytes, largest such set."""
    chosen: set[str] = set()
    for table in sorted(tables, key=lambda t: (t.num_embeddings, t.name)):
        available -= table.dense_bytes
        if available < 0:
            break
        chosen.add(table.name)
    return chosen


def budget_of(tables: Sequence[TableShape], compression: float) -> int:
    """Bytes that tables of equal dim and dtype may take together."""
    if not tables:
        raise ValueError("tables must not be empty")
    if len({table.row_bytes for table in tables}) > 1:
        raise ValueError(
            "the tables of a group must have the same embedding_dim and dtype, got "
            + ", ".join(f"{t.name!r}: {t.embedding_dim} x {t.item_bytes} bytes" for t in tables)
        )
    return math.floor(sum(table.dense_bytes for table in tables) / compression)


def too_small(
    tables: Sequence[TableShape], compression: float, fits: Callable[[float], bool]
) -> ValueError:
    """The refusal of a compression, with the largest that works, found by bisection."""
    works, fails = 1.0, compression
    while fails > 1.0001 * works:
        middle = math.sqrt(works * fails)
        works, fails = (middle, fails) if fits(middle) else (works, middle)
    works = math.floor(100 * works) / 100
    # Keeping one table more whole can make a lower compression the one that fails.
    while works > 1 and not fits(works):
        works = math.floor(99 * works) / 100
    advice = (
        f"the largest compression that works is {works:.15g}"
        if works >= 1 and fits(works)
        else "leave the table uncompressed"
    )
    names = ", ".join(repr(table.name) for table in tables)
    dense = sum(table.dense_bytes for table in tables)
    return ValueError(
        f"compression={compression:g} leaves no row for table {names}: {dense} bytes / "
        f"{compression:g} is too little; {advice}"
    )


def split_rows(tables: Sequence[TableShape], rows: int, *, exponent: float) -> dict[str, int]:
    """Divide ``rows`` in proportion to ``num_embeddings ** exponent``.

    Every table gets at least one row and at most one per id; what a table cannot use goes to the
    others.
    """
    shared: dict[str, int] = {}
    weights = {t.name: float(t.num_embeddings) ** exponent for t in tables}
    left, total = rows, sum(weights.values())
    # Tables that reach a limit come first, so that the rest can share what remains.
    for table in sorted(tables, key=lambda t: (t.num_embeddings / weights[t.name], t.name)):
        weight = weights[table.name]
        others = len(tables) - len(shared) - 1
        part = min(math.floor(left * weight / total), left - others)
        shared[table.name] = min(table.num_embeddings, max(1, part))
        left -= shared[table.name]
        total -= weight
    return {table.name: shared[table.name] for table in tables}


def rows_alone(tables: Sequence[TableShape], shared: dict[str, int], row_bytes: int) -> Allocation:
    """The allocation of tables that have shared rows and nothing else.

    Args:
        tables: the tables, in order.
        shared: rows of each.
        row_bytes: bytes of a row.
    """
    memory = MemoryBreakdown(
        shared_bytes=sum(shared.values()) * row_bytes,
        hot_bytes=0,
        sketch_bytes=0,
        map_bytes=0,
        dense_bytes=sum(table.dense_bytes for table in tables),
    )
    return Allocation(
        shared_rows=MappingProxyType({table.name: shared[table.name] for table in tables}),
        memory=memory,
    )
