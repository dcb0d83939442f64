"""How single tables are kept, from a file in the words of ``torchrec-cafe plan``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torchrec_cafe as tc
from torchrec_cafe.config import TableShape
from torchrec_cafe.planning.entries import read_entries
from torchrec_cafe.planning.tables_file import constraint_of

#: the entry of all tables that have none of their own
DEFAULT = "default"
# What the model's tables are like: a file may say so, and nothing else.
_FIXED = {"data_type": "fp32", "pooling": "sum", "features": 1}


def read_table_constraints(
    path: Path, shapes: Sequence[TableShape]
) -> dict[str, tc.ParameterConstraints]:
    """Read how each table is kept.

    The file is one that ``torchrec-cafe plan --tables`` reads, but only ``name`` must be given:
    sizes are those of the data. The entry named ``default`` is that of all tables without one;
    without it they are TorchRec's own.

    Args:
        path: of the file.
        shapes: the uncompressed tables.

    Returns:
        By name of the table.

    Raises:
        ValueError: naming the file, the table and the field, what it must be and what it was.
        OSError: if the file cannot be read.
    """
    entries = read_entries(path, required=("name",))
    by_name = {shape.name: shape for shape in shapes}
    if unknown := sorted(entries.keys() - by_name.keys() - {DEFAULT}):
        raise ValueError(
            f"{path}: {', '.join(unknown)}: no such table; the data has {', '.join(by_name)}, and "
            f"{DEFAULT!r} stands for all others"
        )
    for name, entry in entries.items():
        _check(entry, by_name.get(name), str(path))
    default: Mapping[str, Any] = entries.get(DEFAULT, {"name": DEFAULT})
    return {name: _constraint(entries.get(name, default), str(path)) for name in by_name}


def _check(entry: Mapping[str, Any], shape: TableShape | None, where: str) -> None:
    """Refuse what the model's tables are not."""
    fixed: dict[str, Any] = dict(_FIXED)
    for field in ("num_embeddings", "embedding_dim"):
        fixed[field] = getattr(shape, field, None)  # None: of many tables, and left out
    for field, wanted in fixed.items():
        given = entry.get(field, wanted)
        if (given.lower() if isinstance(given, str) else given) != wanted:
            raise ValueError(
                f"{where} ({entry['name']!r}): {field} must be left out"
                f"{'' if wanted is None else f' or {wanted}, as the table is'}, got {given!r}"
            )


def _constraint(entry: Mapping[str, Any], where: str) -> tc.ParameterConstraints:
    constraint = constraint_of(entry, where)
    exact = constraint.table is None or isinstance(constraint.table, tc.Lookahead)
    if constraint.sharding_types is None and exact:  # as the kinds full and lookahead are
        return dataclasses.replace(constraint, sharding_types=["table_wise"])
    return constraint
