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

from torchrec_cafe.config import KINDS, TableKind
from torchrec_cafe.distributed import ParameterConstraints
from torchrec_cafe.distributed.capacity import COMPUTE_KERNELS, SHARDING_TYPES
from torchrec_cafe.planning.entries import read_entries

_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


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

    Args:
        path: of the file.

    Raises:
        ValueError: naming the file, the table and the field, what it must be and what it was.
    """
    configs: list[EmbeddingBagConfig] = []
    constraints: dict[str, ParameterConstraints] = {}
    for name, entry in read_entries(path).items():
        where = str(path)
        configs.append(_config(entry, name, where))
        constraints[name] = constraint_of(entry, where)
    module = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    return Tables(module, constraints)


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


def constraint_of(entry: Mapping[str, Any], where: str) -> ParameterConstraints:
    """How a table is to be kept.

    Args:
        entry: of :func:`torchrec_cafe.planning.entries.read_entries`.
        where: the file, for errors.

    Raises:
        ValueError: naming the file, the table and the field, what it must be and what it was.
    """
    for field, known in (("sharding_types", SHARDING_TYPES), ("compute_kernels", COMPUTE_KERNELS)):
        if unknown := [value for value in entry.get(field) or () if value not in known]:
            raise ValueError(
                f"{where} ({entry['name']!r}): {field} must be of {list(known)}, got {unknown}"
            )
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
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"{where} ({entry['name']!r}): table.kind must be one of {sorted(KINDS)}, got {name!r}"
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
