"""A file that describes tables: what ``torchrec-cafe plan`` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_cafe.config import (
    Cafe,
    Hash,
    Lookahead,
    MemRec,
    QuotientRemainder,
    TableKind,
)
from torchrec_cafe.distributed import ParameterConstraints

_KINDS: Mapping[str, type[TableKind]] = {
    kind.__name__: kind for kind in (Cafe, Hash, Lookahead, MemRec, QuotientRemainder)
}
_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}
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


@dataclass(frozen=True)
class Tables:
    """Tables, as a model would have them.

    Attributes:
        module: a collection of all tables on the meta device, wrapped as a model would.
        constraints: of each table.
    """

    module: EmbeddingBagCollection
    constraints: dict[str, ParameterConstraints]


def read_tables(path: Path) -> Tables:
    """Read a description of tables.

    The file is a YAML list, or has one under ``tables``, of mappings with ``name``,
    ``num_embeddings`` and ``embedding_dim``; and, if wanted, ``count`` (so many tables, named
    ``<name>_0`` and so on), ``data_type`` (``FP32`` or ``FP16``), ``pooling`` (``sum`` or
    ``mean``), ``bag_size`` (mean lookups of a sample), ``features`` (that share the table),
    ``table`` (``{kind: Cafe, compression: 100}``), ``sharding_types``, ``compute_kernels``.

    Args:
        path: of the file.

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
    configs: list[EmbeddingBagConfig] = []
    constraints: dict[str, ParameterConstraints] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: table {number}"
        _check(entry, where)
        for name in _names(entry):
            if name in constraints:
                raise ValueError(f"{where}: the name {name!r} is taken by another table")
            configs.append(_config(entry, name, where))
            constraints[name] = _constraint(entry, where)
    module = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    return Tables(module, constraints)


def _check(entry: Any, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: must be a mapping, got {entry!r}")
    for name, wanted in _REQUIRED.items():
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


def _choice(entry: Mapping[str, Any], field: str, choices: Mapping[str, Any], where: str) -> Any:
    given = entry.get(field, next(iter(choices)))
    for name, value in choices.items():
        if name.lower() == given.lower():
            return value
    raise ValueError(
        f"{where} ({entry['name']!r}): {field} must be one of {list(choices)}, got {given!r}"
    )


def _config(entry: Mapping[str, Any], name: str, where: str) -> EmbeddingBagConfig:
    types = {"FP32": DataType.FP32, "FP16": DataType.FP16}
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=entry["num_embeddings"],
        embedding_dim=entry["embedding_dim"],
        data_type=_choice(entry, "data_type", types, where),
        pooling=_choice(entry, "pooling", _POOLING, where),
        feature_names=[f"{name}/{number}" for number in range(entry.get("features", 1))],
    )


def _constraint(entry: Mapping[str, Any], where: str) -> ParameterConstraints:
    bag_size = float(entry.get("bag_size", 1))
    return ParameterConstraints(
        table=_kind(entry, where),
        sharding_types=entry.get("sharding_types"),
        compute_kernels=entry.get("compute_kernels"),
        pooling_factors=[bag_size] * entry.get("features", 1),
    )


def _kind(entry: Mapping[str, Any], where: str) -> TableKind | None:
    given = entry.get("table")
    if given is None:
        return None
    arguments = dict(given)
    name = arguments.pop("kind", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"{where} ({entry['name']!r}): table.kind must be one of {sorted(_KINDS)}, got {name!r}"
        )
    fields = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(arguments.keys() - fields):
        raise ValueError(
            f"{where} ({entry['name']!r}): {name} has no arguments {unknown}, only {sorted(fields)}"
        )
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} ({entry['name']!r}): {error}") from error
