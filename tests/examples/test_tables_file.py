"""``--tables``: how single tables are kept, in the words of ``torchrec-cafe plan``."""

from __future__ import annotations

from pathlib import Path

import pytest

import torchrec_cafe as tc
from examples.dlrm.config import parse_args
from examples.dlrm.tables_file import read_table_constraints
from torchrec_cafe.config import TableShape

SHAPES = [
    TableShape(name=name, num_embeddings=size, embedding_dim=16)
    for name, size in (("t_user", 1000), ("t_item", 100), ("t_hour", 24), ("t_day", 7))
]
EXAMPLE = """
- {name: default, table: {kind: Hash, compression: 10}}
- {name: t_user, num_embeddings: 1000, table: {kind: Cafe, compression: 100, half_life: 300}}
- {name: t_hour}
- {name: t_day, sharding_types: [data_parallel], data_type: fp32, embedding_dim: 16}
"""


def read(folder: Path, text: str) -> dict[str, tc.ParameterConstraints]:
    path = folder / "tables.yaml"
    path.write_text(text)
    return read_table_constraints(path, SHAPES)


def test_every_table_is_kept_as_the_file_says(tmp_path: Path):
    found = read(tmp_path, EXAMPLE)
    kept = {name: (c.table, c.sharding_types) for name, c in found.items()}
    assert kept == {
        "t_user": (tc.Cafe(compression=100, half_life=300), None),
        "t_item": (tc.Hash(compression=10), None),
        "t_hour": (None, ["table_wise"]),
        "t_day": (None, ["data_parallel"]),
    }
    found = read(tmp_path, "tables: [{name: t_user, table: {kind: Lookahead}}]")
    assert found["t_user"].sharding_types == ["table_wise"]
    assert {c.table for name, c in found.items() if name != "t_user"} == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: t_shop}", "t_shop: no such table; the data has t_user, t_item, .*'default'"),
        ("- {name: t_user, table: {kind: Magic}}", r"\('t_user'\): table.kind must be one of"),
        (
            "- {name: t_user, table: {kind: Hash, half_life: 3}}",
            r"\('t_user'\): Hash has no arguments \['half_life'\]",
        ),
        (
            "- {name: t_user, table: {kind: Cafe, compression: 0}}",
            r"\('t_user'\): compression must be a finite number >= 1, got 0",
        ),
        ("- {name: t_user, pooling: mean}", r"\('t_user'\): pooling must be left out or sum"),
        (
            "- {name: t_user, num_embeddings: 9}",
            "num_embeddings must be left out or 1000, .* got 9",
        ),
        ("- {name: default, num_embeddings: 9}", "num_embeddings must be left out, got 9"),
        ("- {num_embeddings: 9}", "table 0: name must be given as str"),
        ("- {name: t_user, kind: Cafe}", r"\('t_user'\): unknown fields \['kind'\]"),
        ("7", "must be a list of tables"),
    ],
)
def test_errors_name_file_table_and_field(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=rf"tables\.yaml.*{message}"):
        read(tmp_path, text)


def test_a_file_is_a_kind_of_its_own():
    assert parse_args(["--tables", "my.yaml"]).kinds == ("full", "hash", "cafe", "custom")
    assert parse_args(["--tables", "my.yaml", "--kinds", "custom"]).kinds == ("custom",)
    assert parse_args(["--table_kind", "mem_rec"]).kinds == ("mem_rec",)
    with pytest.raises(ValueError, match="--kinds custom needs --tables"):
        parse_args(["--kinds", "custom"])
