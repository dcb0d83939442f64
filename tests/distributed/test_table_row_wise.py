"""Table-row-wise compressed tables on two hosts of two gloo ranks: the same as row-wise ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torchrec_cafe as tc
from tests.distributed import models, tasks
from tests.distributed.ranks import run_ranks

KINDS = ["factors", "quotient_remainder", "mem_rec", "mem_rec_sample"]
SHARDING = "table_row_wise"


def test_tables_learn_what_row_wise_ones_do(tmp_path: Path):
    (alone,) = run_ranks(1, tmp_path / "alone", tasks.learn_all, KINDS, "row_wise")
    parts = run_ranks(4, tmp_path / "parts", tasks.learn_all, KINDS, SHARDING, num_hosts=2)
    for kind, expected in alone.items():
        joined = tasks.joined([part[kind] for part in parts])
        assert joined.keys() == expected.keys()
        for name, whole in expected.items():
            if "sketch" in name:
                assert torch.equal(joined[name], whole), (kind, name)
            else:
                torch.testing.assert_close(joined[name], whole, msg=f"{kind}: {name}")


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", [models.CAFE, tc.QuotientRemainder(compression=5)], ids=repr)
def test_no_rows_share_their_place_with_an_empty_shard(kind: Any, world_size: int):
    """DCP would save one of the two."""
    sizes = {"t_big": 50_000, "t_a": 40, "t_b": 10, "t_c": 9, "t_d": 8}
    constraint = tc.ParameterConstraints(table=kind)
    plan = models.planner(dict.fromkeys(sizes, constraint), world_size).plan(
        models.collection(sizes), [models.sharder()]
    )
    for name, entry in plan.plan[""].items():
        shards = entry.sharding_spec.shards
        rows = [shard.shard_sizes[0] for shard in shards]
        assert sum(rows) == entry.group.table(name).shared_rows
        places = [shard.shard_offsets[0] for shard in shards]
        full = [place for place, size in zip(places, rows, strict=True) if size > 0]
        empty = {place for place, size in zip(places, rows, strict=True) if size == 0}
        assert len(set(full)) == len(full)
        assert not empty & set(full)


@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_equals_the_unsharded_module(tmp_path: Path, weighted: bool):
    for sharded, unsharded in run_ranks(4, tmp_path, tasks.pooled, SHARDING, weighted, num_hosts=2):
        torch.testing.assert_close(sharded, unsharded)


def _two_pools() -> list[str]:
    """Names of the tables that have rows on this rank, of two pools that each take a host."""
    sizes = {"t_one": 4000, "t_two": 4000, "t_three": 4000, "t_four": 4000}
    kinds: dict[str, Any] = {}
    for number, name in enumerate(sizes):
        kind = tc.Cafe(compression=5 + number // 2, num_shards=8)
        kinds[name] = tc.ParameterConstraints(table=kind, sharding_types=[SHARDING])
    model = models.sharded(models.collection(sizes), kinds)
    for batch in models.batches(3, 8, sizes):
        model(batch).values().sum().backward()
    assert dist.get_world_size() == 4
    return sorted(
        name.split(".")[1]
        for name, value in models.local_state(model).items()
        if name.endswith(".weight") and len(value)
    )


def test_a_pool_lies_on_one_host_and_on_all_of_its_ranks(tmp_path: Path):
    ranks = run_ranks(4, tmp_path, _two_pools, num_hosts=2)
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    assert not set(ranks[0]) & set(ranks[2])
    assert sorted(ranks[0] + ranks[2]) == [
        "cafe_pool_t_one", "cafe_pool_t_three", "t_four", "t_one", "t_three", "t_two"
    ]  # fmt: skip
    for names in ranks:
        assert ("cafe_pool_t_one" in names) == ("t_one" in names) == ("t_two" in names)


def test_more_ranks_of_a_host_than_virtual_shards_are_refused():
    kind = tc.ParameterConstraints(table=models.CAFE, sharding_types=[SHARDING])
    with pytest.raises(ValueError, match=r"num_shards=8 for 9 ranks"):
        models.planner({"t_big": kind}, 9).plan(models.collection(), [models.sharder()])
