"""What a checkpoint says of how a table was kept, so that it cannot be taken for another one.

The shapes of weights say little: tables kept as :class:`torchrec_cafe.Hash` and as
:class:`torchrec_cafe.Cafe`, or of one id more, may have the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchrec_cafe.config import Cafe, MemRec
from torchrec_cafe.distributed.types import CompressedGroup, CompressedTable

#: Version of what checkpoints hold of compressed tables; older versions of the package refuse it.
FORMAT = 2

_NAMES = (
    "num_embeddings",
    "shared_rows",
    "number_in_pool",
    "num_shards",
    "hot_rows_per_shard",
    "second_rows_per_shard",
    "token_rows_per_shard",
    "buckets_per_shard",
    "weights_per_shard",
    "num_hashes",
    "num_weight_hashes",
    "per_sample",
)
_KINDS = {
    "Cafe": "cafe",
    "Hash": "hash",
    "MemRec": "mem_rec",
    "QuotientRemainder": "quotient_remainder",
}
_KEY = re.compile(rf"^(?P<table>.+)\.(?P<kind>{'|'.join(_KINDS.values())})_v(?P<format>\d+)$")


def layout_key(group: CompressedGroup, table: CompressedTable) -> str:
    """Key of a table's layout, after that of its collection: it names the kind and the format.

    So a checkpoint of another kind, or of a newer format, lacks it, which any way of loading finds
    before it reads a row.
    """
    return f"{table.name}.{_KINDS[type(group.kind).__name__]}_v{FORMAT}"


def parse_layout_key(key: str) -> tuple[str, str, int] | None:
    """Table with the path of its collection, kind and format that a key names, if it is a layout's.

    Args:
        key: key of a state dict.
    """
    found = _KEY.match(key)
    return None if found is None else (found["table"], found["kind"], int(found["format"]))


def layout_tensor(group: CompressedGroup, table: CompressedTable) -> Tensor:
    """The layout of a table, int64: what decides where the rows of its ids are."""
    kind = group.kind
    num_hashes = kind.num_hashes if isinstance(kind, MemRec) else 0
    num_weight_hashes = 0
    if isinstance(kind, MemRec):
        num_weight_hashes = kind.num_weight_hashes
    elif isinstance(kind, Cafe) and group.weights_per_shard > 0:
        num_weight_hashes = kind.weight_hashes
    return torch.tensor(
        [
            table.num_ids,
            table.shared_rows,
            table.index,
            group.num_shards,
            group.hot_rows_per_shard,
            group.second_rows_per_shard,
            group.token_rows_per_shard,
            group.buckets_per_shard,
            group.weights_per_shard,
            num_hashes,
            num_weight_hashes,
            int(group.is_per_sample),
        ]
    )


def layout_tensors(groups: Iterable[CompressedGroup]) -> dict[str, Tensor]:
    """The layouts of all compressed tables of some groups, by :func:`layout_key`."""
    return {
        layout_key(group, table): layout_tensor(group, table)
        for group in groups
        if not group.looks_ahead  # their rows are those of TorchRec's own tables
        for table in group.tables
    }


def differences(saved: Tensor, expected: Tensor) -> str:
    """How two layouts differ, for an error message; empty if they do not.

    Args:
        saved: int64, layout in a checkpoint.
        expected: int64, layout of a table.
    """
    if saved.shape != expected.shape:
        return f"{saved.numel()} numbers instead of {expected.numel()}"
    rows = zip(_NAMES, saved.tolist(), expected.tolist(), strict=True)
    return ", ".join(f"{name} {old} instead of {new}" for name, old, new in rows if old != new)


def take_layouts(
    groups: Iterable[CompressedGroup], state_dict: dict[str, Any], prefix: str
) -> list[str]:
    """Check the layouts of a checkpoint and take them out of ``state_dict``.

    Args:
        groups: the groups of a collection.
        state_dict: mutated: the layouts are removed.
        prefix: what goes before the names of tables.

    Returns:
        Keys that the tables need and ``state_dict`` lacks.

    Raises:
        ValueError: if a table was kept in another way.
    """
    missing = []
    for name, expected in layout_tensors(groups).items():
        saved = state_dict.pop(prefix + name, None)
        if saved is None:
            missing.append(prefix + name)
        elif found := differences(saved, expected):
            raise ValueError(kept_otherwise(name.rsplit(".", 1)[0], found))
    return missing


def kept_otherwise(table: str, found: str) -> str:
    """Message for a table whose layout in a checkpoint is another.

    Args:
        table: its name.
        found: see :func:`differences`.
    """
    return (
        f"table {table!r}: the checkpoint has {found}; load it into a table of the same "
        "num_embeddings and kind, planned beside the same other tables of its kind"
    )


def layouts_in(keys: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Kind and format of each table that has a layout among some keys.

    Args:
        keys: of a state dict or of a checkpoint's metadata.
    """
    return {
        found[0]: (found[1], found[2])
        for found in (parse_layout_key(key) for key in keys)
        if found is not None
    }
