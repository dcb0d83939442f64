"""The file that describes tables: what is in it, without TorchRec."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_REQUIRED = {"name": str, "num_embeddings": int, "embedding_dim": int}
_OPTIONAL = {
    "count": int,
    "data_type": str,
    "pooling": str,
    "bag_size": (int, float),
    "features": int,
    "table": Mapping,
    "sharding_types": list,
    "compute_kernels": list,
}


def read_entries(
    path: Path, *, required: Collection[str] = frozenset(_REQUIRED)
) -> dict[str, Mapping[str, Any]]:
    """Read the entries of a description of tables.

    The file is a YAML list, or has one under ``tables``, of mappings with ``name``,
    ``num_embeddings`` and ``embedding_dim``; and, if wanted, ``count`` (so many tables, named
    ``<name>_0`` and so on), ``data_type`` (``FP32`` or ``FP16``), ``pooling`` (``sum`` or
    ``mean``), ``bag_size`` (mean lookups of a sample), ``features`` (that share the table),
    ``table`` (``{kind: Cafe, compression: 100}``), ``sharding_types``, ``compute_kernels``.

    Args:
        path: of the file.
        required: of ``name``, ``num_embeddings`` and ``embedding_dim``, the fields that every entry
            must have; ``name`` is one.

    Returns:
        By name of the table, its entry; the fields have the right types.

    Raises:
        ValueError: naming the file, the table and the field, what it must be and what it was.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: must be YAML: {error}") from error
    entries = content.get("tables") if isinstance(content, Mapping) else content
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path}: must be a list of tables, or a mapping with one under `tables`, got "
            f"{type(content).__name__}"
        )
    found: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: table {number}"
        _check(entry, where, required)
        for name in _names(entry):
            if name in found:
                raise ValueError(f"{where}: the name {name!r} is taken by another table")
            found[name] = entry
    return found


def _check(entry: Any, where: str, required: Collection[str]) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: must be a mapping, got {entry!r}")
    for name, wanted in _REQUIRED.items():
        if name not in required and name not in entry:
            continue
        if not isinstance(entry.get(name), wanted) or isinstance(entry.get(name), bool):
            raise ValueError(
                f"{where}: {name} must be given as {wanted.__name__}, got {entry.get(name)!r}"
            )
    unknown = sorted(map(str, entry.keys() - _REQUIRED.keys() - _OPTIONAL.keys()))
    if unknown:
        raise ValueError(f"{where} ({entry['name']!r}): unknown fields {unknown}")
    for name, wanted in _OPTIONAL.items():
        value = entry.get(name)
        if value is not None and not isinstance(value, wanted):
            raise ValueError(f"{where} ({entry['name']!r}): {name} cannot be {value!r}")
    for name in ("num_embeddings", "embedding_dim", "count", "features", "bag_size"):
        if entry.get(name, 1) <= 0:
            raise ValueError(f"{where} ({entry['name']!r}): {name} must be > 0, got {entry[name]}")


def _names(entry: Mapping[str, Any]) -> list[str]:
    if "count" not in entry:
        return [entry["name"]]
    return [f"{entry['name']}_{number}" for number in range(entry["count"])]
