"""Budget mode: the planner is handed memory and chooses how tables are kept."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner as TorchRecPlanner
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints as TorchRecConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from torchrec_cafe.distributed import BudgetError, CompressedParameterSharding

MIB = 2**20
#: 256 MiB of plain tables
SIZES = {"t_huge": 4_000_000, "t_large": 2_000_000, "t_medium": 1_900_000, "t_small": 488_608}


def statistics(share_of_a_tenth: float, rows: int = 4_000_000) -> tc.IdStatistics:
    """Ids of whose lookups so many go to a tenth of a percent, and nearly all to a tenth."""
    return tc.IdStatistics(
        num_lookups=10**8,
        num_distinct=float(rows),
        bag_size=1.0,
        batch_size=2048,
        zipf_exponent=1.1,
        drift_per_day=0.0,
        drift_ids=100,
        coverage=(
            (1, 0.01),
            (rows // 1000, share_of_a_tenth),
            (rows // 10, max(share_of_a_tenth, 0.95)),
            (rows, 1.0),
        ),
        lru_hits=(),
        lookahead_hits=(),
    )


def planner(
    capacity: int,
    auto: tc.Auto | None = None,
    *,
    world_size: int = 2,
    constraints: dict[str, Any] | None = None,
    **options: Any,
) -> tc.EmbeddingShardingPlanner:
    return tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu", ddr_cap=capacity),
        constraints=constraints,
        auto=auto or tc.Auto(),
        batch_size=64,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        debug=False,
        **options,
    )


def plan(of: tc.EmbeddingShardingPlanner, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    return of.plan(models.collection(sizes or SIZES), [models.sharder()]).plan[""]


def kind_of(entry: Any) -> Any:
    return entry.kind if isinstance(entry, CompressedParameterSharding) else None


def test_what_fits_stays_plain():
    chosen = planner(600 * MIB)
    entries = plan(chosen)
    assert all(kind_of(entry) is None for entry in entries.values())
    assert all(entry.compute_kernel == "fused" for entry in entries.values())
    assert chosen.report is not None
    assert [row.why for row in chosen.report.rows] == ["fits as it is"] * 4


def test_without_statistics_rows_stay_exact_if_they_can(tmp_path: Path):
    """Files are exact; compression of unknown ids is the last resort, and little of it."""
    exact = tc.Auto(allow=(tc.Cafe, tc.Lookahead(path=str(tmp_path), min_slots=1)))
    entries = plan(planner(80 * MIB, exact))
    kinds = {name: kind_of(entry) for name, entry in entries.items()}
    assert any(isinstance(kind, tc.Lookahead) for kind in kinds.values())
    assert not any(isinstance(kind, tc.Cafe) for kind in kinds.values())
    kinds = {name: kind_of(entry) for name, entry in plan(planner(80 * MIB)).items()}
    compressed = [kind for kind in kinds.values() if isinstance(kind, tc.Cafe)]
    assert compressed
    assert all(kind.compression == 10 for kind in compressed)


def test_statistics_say_which_table_to_compress():
    """Two tables of the same size: the one whose lookups go to few ids is compressed."""
    sizes = {"t_skewed": 2_000_000, "t_flat": 2_000_000}
    stats = {"t_skewed": statistics(0.97, 2_000_000), "t_flat": statistics(0.02, 2_000_000)}
    for order in (sizes, dict(reversed(sizes.items()))):
        chosen = planner(80 * MIB, tc.Auto(stats=stats), world_size=1)
        entries = plan(chosen, order)
        assert kind_of(entries["t_flat"]) is None
        assert isinstance(kind_of(entries["t_skewed"]), tc.Cafe)
        assert chosen.report is not None
        row = next(row for row in chosen.report.rows if row.table == "t_skewed")
        assert row.risk is not None
        assert 0 < row.risk < 0.1
        assert "of the lookups own a row" in row.why


def test_the_smaller_the_budget_the_less_memory_and_the_more_risk():
    stats = {name: statistics(0.6, size) for name, size in SIZES.items()}
    used, risks = [], []
    for capacity in (300, 100, 60, 30, 10):
        chosen = planner(capacity * MIB, tc.Auto(stats=stats))
        plan(chosen)
        assert chosen.report is not None
        assert max(chosen.report.device_bytes_of_ranks) <= capacity * MIB
        used.append(sum(chosen.report.device_bytes_of_ranks))
        risks.append(sum(row.risk or 0.0 for row in chosen.report.rows))
    assert used == sorted(used, reverse=True)
    assert risks == sorted(risks)


def test_a_budget_that_is_too_small_says_what_is_missing():
    with pytest.raises(
        BudgetError, match=r"no choice for the tables fits: .* are missing"
    ) as error:
        plan(planner(MIB // 9))
    assert error.value.device_missing > 0
    with pytest.raises(BudgetError, match="max_compression than 10,"):
        plan(planner(8 * MIB, tc.Auto(max_compression=10)))
    with pytest.raises(BudgetError, match=r"table 't_huge' fits no rank .* allow=\(\)"):
        plan(planner(30 * MIB, tc.Auto(allow=())))
    with pytest.raises(ValueError, match="the planner has `auto`, so `sharders` must hold"):
        planner(MIB).plan(models.collection(SIZES), [])


def test_what_the_user_says_of_a_table_is_kept():
    fixed = tc.Hash(compression=50)
    constraints: dict[str, Any] = {
        "t_large": tc.ParameterConstraints(table=fixed, sharding_types=["table_wise"]),
        "t_huge": TorchRecConstraints(pooling_factors=[3.0]),
        "t_small": tc.ParameterConstraints(compute_kernels=["fused"]),
    }
    before = copy.deepcopy(constraints)
    auto = tc.Auto(stats={"t_huge": statistics(0.9)})
    kept = copy.deepcopy(auto)
    chosen = planner(60 * MIB, auto, constraints=constraints)
    entries = plan(chosen)
    assert kind_of(entries["t_large"]) == fixed
    assert entries["t_large"].sharding_type == "table_wise"
    assert isinstance(kind_of(entries["t_huge"]), tc.Cafe)
    assert kind_of(entries["t_small"]) is None
    assert constraints == before
    assert auto == kept
    assert str(plan(chosen)) == str(entries)  # again, from the same objects


def test_a_cluster_gets_pools_on_its_hosts():
    sizes = {f"t_{number}": 3_000_000 for number in range(24)}
    chosen = tc.EmbeddingShardingPlanner(
        topology=Topology(
            world_size=16, local_world_size=4, compute_device="cuda", hbm_cap=48 * MIB, ddr_cap=MIB
        ),
        auto=tc.Auto(stats={name: statistics(0.9, size) for name, size in sizes.items()}),
        batch_size=64,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        debug=False,
    )
    entries = plan(chosen, sizes)
    pools: dict[Any, set[tuple[int, ...]]] = {}
    for entry in entries.values():
        if isinstance(kind_of(entry), tc.Cafe):
            assert entry.sharding_type == "table_row_wise"
            assert entry.ranks == list(range(entry.ranks[0], entry.ranks[0] + 4))
            pools.setdefault(kind_of(entry), set()).add(tuple(entry.ranks))
    assert len(pools) > 1
    assert all(len(hosts) == 1 for hosts in pools.values())
    assert len(set().union(*pools.values())) > 1


def test_torchrecs_caches_are_options_on_cuda():
    """Host memory is there, and nothing may be compressed."""
    chosen = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=2, compute_device="cuda", hbm_cap=60 * MIB, ddr_cap=2**30),
        auto=tc.Auto(allow=()),
        batch_size=64,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        debug=False,
    )
    entries = plan(chosen)
    kernels = {entry.compute_kernel for entry in entries.values()}
    assert kernels & {"fused_uvm", "fused_uvm_caching"}
    for entry in entries.values():
        if entry.compute_kernel == "fused_uvm_caching":
            assert entry.cache_params.load_factor in tc.Auto().cache_fractions


def test_the_report_is_for_people_and_programs():
    chosen = planner(60 * MIB, tc.Auto(stats={"t_huge": statistics(0.9)}))
    plan(chosen)
    report = chosen.report
    assert report is not None
    text = str(report)
    assert "Cafe(compression=" in text
    assert "4 tables: " in text
    assert text.splitlines()[0].split()[:3] == ["table", "kept", "sharding"]
    values = json.loads(report.to_json())
    assert [row["table"] for row in values["rows"]] == list(SIZES)
    assert sum(row["dense_bytes"] for row in values["rows"]) == sum(SIZES.values()) * 32
    short = str(dataclasses.replace(report, max_printed=1))
    assert "... and 3 more tables" in short


def test_tables_without_auto_or_kind_are_torchrecs():
    topology = Topology(world_size=2, compute_device="cpu")
    ours = tc.EmbeddingShardingPlanner(topology=topology, debug=False)
    stock = TorchRecPlanner(topology=topology, debug=False)
    assert type(ours._enumerator._estimators[0]) is type(stock._enumerator._estimators[0])  # noqa: SLF001
    assert str(plan(ours)) == str(stock.plan(models.collection(SIZES), [models.sharder()]).plan[""])
    assert ours.report is None


def test_optimizer_state_of_plain_tables_is_counted():
    """Two tables of 122 MiB fit 300 MiB with one value a row, and not with one a weight."""
    sizes = {"t_one": 4_000_000, "t_two": 4_000_000}
    kinds = []
    for optimizer in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD):
        chosen = planner(300 * MIB, world_size=1)
        entries = chosen.plan(models.collection(sizes), [models.sharder(optimizer)]).plan[""]
        kinds.append([kind_of(entry) for entry in entries.values()])
        assert chosen.report is not None
        assert max(chosen.report.device_bytes_of_ranks) <= 300 * MIB
    assert kinds[0] == [None, None]
    assert kinds[1] != [None, None]


def test_slots_hold_the_rows_of_a_batch(tmp_path: Path):
    sizes = {"t_huge": 4_000_000}
    auto = tc.Auto(
        allow=(tc.Lookahead(path=str(tmp_path), min_slots=1),), cache_fractions=(0.0001, 0.01)
    )
    chosen = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu", ddr_cap=40 * MIB),
        auto=auto,
        batch_size=8192,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        debug=False,
    )
    assert kind_of(plan(chosen, sizes)["t_huge"]).cache_fraction == 0.01


def test_what_cannot_be_chosen_is_left_out():
    """Adam is not for kinds on CPU; the pool must have a shard for each rank."""
    few = tc.Auto(allow=(tc.Cafe(compression=1, num_shards=2), tc.Hash))
    for entry in plan(planner(30 * MIB, few, world_size=4)).values():
        assert not isinstance(kind_of(entry), tc.Cafe)
    roomy = planner(600 * MIB, world_size=4)
    entries = roomy.plan(models.collection(SIZES), [models.sharder(EmbOptimType.ADAM)]).plan[""]
    assert all(kind_of(entry) is None for entry in entries.values())


def test_nothing_to_choose_is_a_plan_too():
    fixed = tc.ParameterConstraints(table=tc.Hash(compression=50))
    entries = plan(planner(60 * MIB, constraints=dict.fromkeys(SIZES, fixed)))
    assert all(kind_of(entry) == fixed.table for entry in entries.values())
    whole: dict[str, Any] = {"t_small": TorchRecConstraints(sharding_types=["data_parallel"])}
    assert plan(planner(600 * MIB, constraints=whole))["t_small"].sharding_type == "data_parallel"


def test_collections_in_what_is_sharded_as_a_whole_are_torchrecs():
    inner = models.collection({"t_inner": 4_000_000}, is_weighted=True)
    processor = PositionWeightedModuleCollection({"f_inner": 10})
    module = nn.ModuleDict(
        {
            "processed": FeatureProcessedEmbeddingBagCollection(inner, processor),
            "plain": models.collection({"t_plain": 4_000_000}),
        }
    )
    sharders: list[Any] = [models.sharder(), FeatureProcessedEmbeddingBagCollectionSharder()]
    chosen = planner(150 * MIB, tc.Auto(stats={"t_plain": statistics(0.9)}), world_size=2)
    entries = chosen.plan(module, sharders).plan
    assert kind_of(entries["processed"]["t_inner"]) is None
    assert "t_plain" in entries["plain"]


def test_names_that_are_ambiguous_are_refused():
    module = nn.ModuleList([models.collection(SIZES), models.collection(SIZES)])
    with pytest.raises(ValueError, match="several collections have one of that name"):
        planner(60 * MIB).plan(module, [models.sharder()])
    fixed = tc.ParameterConstraints(table=tc.Hash(compression=50))
    with pytest.raises(ValueError, match="table 't_huge': two collections have one of that name"):
        models.planner({"t_huge": fixed}, 2).plan(module, [models.sharder()])


def test_the_report_counts_a_pool_where_it_lies():
    sizes = {f"t_{number}": 400_000 for number in range(6)}
    constraint = tc.ParameterConstraints(
        table=tc.Cafe(compression=10), sharding_types=["table_row_wise"]
    )
    chosen = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=8, local_world_size=4, compute_device="cpu"),
        constraints=dict.fromkeys(sizes, constraint),
        batch_size=512,
        debug=False,
    )
    entries = plan(chosen, sizes)
    ranks = {rank for entry in entries.values() for rank in entry.ranks}
    assert len(ranks) == 4
    assert chosen.report is not None
    used = [count > 0 for count in chosen.report.device_bytes_of_ranks]
    assert used == [rank in ranks for rank in range(8)]


def test_a_sharder_of_ones_own_is_asked():
    class TableWise(tc.EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return ["table_wise"]

    constraint = tc.ParameterConstraints(table=tc.Hash(compression=50))
    entries = (
        models.planner({"t_huge": constraint}, 2)
        .plan(models.collection(SIZES), [TableWise()])
        .plan[""]
    )
    assert entries["t_huge"].sharding_type == "row_wise"
    assert {entries[name].sharding_type for name in ("t_large", "t_small")} == {"table_wise"}


# --- on ranks -------------------------------------------------------------------------------------


def _together(capacity: int) -> tuple[str, str]:
    of = planner(capacity, tc.Auto(stats={"t_huge": statistics(0.9)}))
    entries = of.collective_plan(models.collection(SIZES), [models.sharder()], dist.group.WORLD)
    return str(entries), str(of.report)


def _refused() -> str:
    with pytest.raises(BudgetError) as error:
        _together(MIB // 64)
    return str(error.value)


def test_ranks_agree_and_are_refused_together(tmp_path: Path):
    first, second = run_ranks(2, tmp_path / "plan", _together, 60 * MIB)
    assert first == second
    assert "Cafe(compression=" in first[1]
    first, second = run_ranks(2, tmp_path / "refused", _refused)
    assert first == second


def test_meta_collections_of_any_size_can_be_planned():
    tables = [
        EmbeddingBagConfig(
            name=f"t_{i}", feature_names=[f"f_{i}"], num_embeddings=10**10, embedding_dim=128
        )
        for i in range(3)
    ]
    big = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    chosen = planner(8 * 2**30, tc.Auto(max_compression=2000, compressions=(1000.0,)))
    entries = chosen.plan(big, [models.sharder()]).plan[""]
    assert all(kind_of(entry) is not None for entry in entries.values())
