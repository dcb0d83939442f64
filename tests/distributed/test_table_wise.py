"""Table-wise compressed tables on gloo ranks: the same as row-wise ones, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import PoolingType

import torchrec_cafe as tc
from tests.distributed import models, tasks
from tests.distributed.ranks import run_ranks

KINDS = ["multi_level", "factors", "quotient_remainder", "mem_rec", "mem_rec_sample"]


def test_table_wise_tables_learn_what_row_wise_ones_do(tmp_path: Path):
    (alone,) = run_ranks(1, tmp_path / "alone", tasks.learn_all, KINDS, "row_wise")
    parts = run_ranks(2, tmp_path / "parts", tasks.learn_all, KINDS, "table_wise")
    for kind, expected in alone.items():
        joined = tasks.joined([part[kind] for part in parts])
        assert joined.keys() == expected.keys()
        for name, whole in expected.items():
            if "sketch" in name:
                assert torch.equal(joined[name], whole), (kind, name)
            else:
                torch.testing.assert_close(joined[name], whole, msg=f"{kind}: {name}")


@pytest.mark.parametrize("weighted", [False, True])
def test_table_wise_pooling_equals_the_unsharded_module(tmp_path: Path, weighted: bool):
    for sharded, unsharded in run_ranks(2, tmp_path, tasks.pooled, "table_wise", weighted):
        torch.testing.assert_close(sharded, unsharded)


def _mixed_means() -> None:
    """Row-wise, table-wise and uncompressed tables pooled by mean in one collection."""
    sizes = {"t_one": 50, "t_two": 31, "t_three": 20}
    whole = tc.Hash(compression=1)
    kinds: dict[str, Any] = {
        "t_one": tc.ParameterConstraints(table=whole, sharding_types=["row_wise"]),
        "t_two": tc.ParameterConstraints(table=whole, sharding_types=["table_wise"]),
        "t_three": tc.ParameterConstraints(sharding_types=["table_wise"]),
    }
    model = models.sharded(models.collection(sizes, pooling=PoolingType.MEAN), kinds)
    for name, value in model.state_dict().items():
        for shard in value.local_shards() if name.endswith(".weight") else ():
            shard.tensor.fill_(1.0)
    for batch in models.batches(2, 8, sizes):
        pooled: Any = model(batch).wait()
        for key in pooled.keys():  # noqa: SIM118  a KeyedTensor is no mapping
            has_ids = batch[key].lengths() > 0
            expected = has_ids.float()[:, None].expand(-1, 8)
            torch.testing.assert_close(pooled[key], expected, rtol=1e-5, atol=1e-5)


def test_means_in_a_mixed_collection(tmp_path: Path):
    run_ranks(2, tmp_path, _mixed_means)


def _spread() -> list[str]:
    """Names of the tables that have rows on this rank."""
    model = models.sharded(
        models.collection(), models.constraints() | _table_wise(models.CAFE, "t_big", "t_small")
    )
    (batch,) = models.batches(1, 8)
    model(batch).values().sum().backward()
    assert dist.get_world_size() == 3
    return sorted(name for name, value in models.local_state(model).items() if len(value))


def _table_wise(kind: Any, *names: str) -> dict[str, Any]:
    constraint = tc.ParameterConstraints(table=kind, sharding_types=["table_wise"])
    return dict.fromkeys(names, constraint)


def test_the_tables_of_a_pool_lie_on_one_rank(tmp_path: Path):
    ranks = run_ranks(3, tmp_path, _spread)
    owners = [rank for rank, names in enumerate(ranks) if any("cafe_pool" in n for n in names)]
    assert len(owners) == 1
    for name in ("t_big", "t_small"):
        held = [
            rank for rank, names in enumerate(ranks) if f"embedding_bags.{name}.weight" in names
        ]
        assert held == owners
    assert all("embedding_bags.t_hash.weight" in names for names in ranks)  # row-wise


def test_a_plan_of_pools_counts_their_bytes_on_their_rank():
    """Two pools that fit a rank each, and not together."""
    sizes = {"t_one": 400_000, "t_two": 400_000, "t_three": 400_000, "t_four": 400_000}
    kinds = _table_wise(tc.Cafe(compression=2), "t_one", "t_two")
    kinds |= _table_wise(tc.Cafe(compression=2.001), "t_three", "t_four")
    plan = models.planner(kinds, 2).plan(models.collection(sizes), [models.sharder()]).plan[""]
    ranks = {name: entry.ranks for name, entry in plan.items()}
    assert ranks["t_one"] == ranks["t_two"] != ranks["t_three"] == ranks["t_four"]
    for name, entry in plan.items():
        (shard,) = entry.sharding_spec.shards
        assert shard.placement.rank() == entry.ranks[0]
        assert shard.shard_sizes == [entry.group.table(name).shared_rows, 8]
