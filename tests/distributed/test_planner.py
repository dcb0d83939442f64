"""The plan says what was asked, refuses what cannot be, and leaves the caller's objects alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TorchRecSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner as TorchRecPlanner
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.partitioners import MemoryBalancedPartitioner
from torchrec.distributed.planner.perf_models import NoopStorageModel
from torchrec.distributed.planner.proposers import (
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import ParameterConstraints as TorchRecConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from torchrec_cafe.config import TableKind, TableShape
from torchrec_cafe.distributed import CompressedParameterSharding
from torchrec_cafe.distributed.optimizers import OptimizerState
from torchrec_cafe.distributed.planned_bytes import plan_table

WORLD_SIZES = [1, 2, 3, 8]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_plan_has_the_kinds_rows_and_bytes_that_were_asked(world_size):
    table_constraints = models.constraints()
    before = copy.deepcopy(table_constraints)
    plan = models.planner(table_constraints, world_size).plan(
        models.collection(), [models.sharder()]
    )
    assert table_constraints == before
    tables = plan.plan[""]
    assert tables.keys() == models.SIZES.keys()
    for name, kind in {"t_big": models.CAFE, "t_small": models.CAFE, "t_hash": models.HASH}.items():
        entry = tables[name]
        assert isinstance(entry, CompressedParameterSharding)
        assert entry.kind == kind
        assert entry.compute_kernel == "customized_kernel"
        assert entry.sharding_type == "row_wise"
        shards = entry.sharding_spec.shards
        assert len(shards) == world_size
        rows = entry.group.table(name).shared_rows
        assert sum(shard.shard_sizes[0] for shard in shards) == rows
        offsets = [shard.shard_offsets[0] for shard in shards]
        assert offsets == entry.group.row_bounds(entry.group.table(name), world_size)[:-1]
    assert tables["t_big"].group is tables["t_small"].group
    assert tables["t_small"].group.table("t_small").shared_rows == 12  # kept whole
    assert tables["t_hash"].group.table("t_hash").shared_rows == 100
    assert not isinstance(tables["t_fused"], CompressedParameterSharding)
    assert tables["t_fused"].compute_kernel == "fused"
    assert pickle.loads(pickle.dumps(plan)).plan[""]["t_big"] == tables["t_big"]


def test_tables_without_a_kind_are_planned_by_torchrec():
    topology = Topology(world_size=2, compute_device="cpu")
    module = models.collection()
    stock = TorchRecPlanner(topology=topology, debug=False).plan(module, [TorchRecSharder()])
    ours = tc.EmbeddingShardingPlanner(topology=topology, debug=False).plan(
        module, [tc.EmbeddingBagCollectionSharder()]
    )
    assert str(ours) == str(stock)
    mixed = models.planner(
        {"t_hash": tc.ParameterConstraints(table=models.HASH), "t_big": TorchRecConstraints()}, 2
    ).plan(module, [tc.EmbeddingBagCollectionSharder()])
    offered = TorchRecSharder().sharding_types("cpu")
    for name in ("t_big", "t_small", "t_fused"):
        assert type(mixed.plan[""][name]) is type(stock.plan[""][name])
        assert mixed.plan[""][name].sharding_type in offered


def test_the_planner_counts_compressed_bytes():
    """A model that does not fit dense fits compressed."""
    module = models.collection({"t_big": 2_000_000})
    topology = Topology(world_size=1, compute_device="cpu", ddr_cap=40 * 2**20)
    dense = tc.EmbeddingShardingPlanner(topology=topology, debug=False)
    with pytest.raises(Exception, match="(?i)unable to find a plan|storage|reservation"):
        dense.plan(module, [models.sharder()])
    plan = tc.EmbeddingShardingPlanner(
        topology=topology,
        constraints={"t_big": tc.ParameterConstraints(table=tc.Cafe(compression=100))},
        debug=False,
    ).plan(module, [models.sharder()])
    assert isinstance(plan.plan[""]["t_big"], CompressedParameterSharding)


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_wise"])
@pytest.mark.parametrize("kind", [*models.KINDS.values(), models.HASH], ids=repr)
def test_planned_bytes_add_up_to_what_is_resident(kind: TableKind, sharding_type: str):
    sizes = {"t_big": 50_000, "t_other": 20_000, "t_small": 12}
    constraint = tc.ParameterConstraints(table=kind, sharding_types=[sharding_type])
    plan = models.planner(dict.fromkeys(sizes, constraint), 2).plan(
        models.collection(sizes), [models.sharder()]
    )
    group = plan.plan[""]["t_big"].group
    ranks = 2 if sharding_type == "row_wise" else 1
    planned = [
        plan_table(group, name, ranks, row_bytes=32, state=OptimizerState(0, 0, 8), on_cpu=True)
        for name in sizes
    ]
    shapes = [
        TableShape(name=name, num_embeddings=size, embedding_dim=8) for name, size in sizes.items()
    ]
    total = sum(sum(table.device) for table in planned)
    assert total == pytest.approx(kind.allocate(shapes).memory.total_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("table_constraints", "world_size", "message"),
    [
        (
            {"t_big": tc.ParameterConstraints(table=models.CAFE, sharding_types=["column_wise"])},
            2,
            "table 't_big': a Cafe table can be sharded row_wise or table_wise or table_row_wise",
        ),
        (
            {"t_big": tc.ParameterConstraints(table=models.CAFE, compute_kernels=["fused_uvm"])},
            2,
            "table 't_big': the compute kernel of a compressed table is its own",
        ),
        (
            {"t_other": tc.ParameterConstraints(table=models.CAFE)},
            2,
            r"compress tables \['t_other'\], which no EmbeddingBagCollection or",
        ),
        (
            {"t_small": tc.ParameterConstraints(table=models.CAFE)},
            2,
            "leaves no row for table 't_small'.*leave the table uncompressed",
        ),
        (
            {"t_big": tc.ParameterConstraints(table=models.CAFE)},
            9,
            r"num_shards=8 for 9 ranks; set Cafe\(num_shards=9\) or more",
        ),
    ],
)
def test_impossible_constraints_are_refused(table_constraints, world_size, message):
    with pytest.raises(ValueError, match=message):
        models.planner(table_constraints, world_size).plan(models.collection(), [models.sharder()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchRec's import
@pytest.mark.parametrize(
    "optimizer", [EmbOptimType.ADAM, EmbOptimType.LAMB, EmbOptimType.PARTIAL_ROWWISE_ADAM]
)
def test_optimizers_that_cannot_follow_a_row_are_refused(optimizer):
    with pytest.raises(ValueError, match=f"table 't_big': .* on cpu must be .*{optimizer.name}"):
        models.planner(models.constraints(), 1).plan(
            models.collection(), [models.sharder(optimizer)]
        )
    module = models.collection()
    weights = module.embedding_bags["t_hash"].parameters()
    apply_optimizer_in_backward(torch.optim.Adam, weights, {"lr": 0.1})
    with pytest.raises(ValueError, match=r"table 't_hash': .* EXACT_SGD, got ADAM;"):
        models.planner(models.constraints(), 1).plan(module, [models.sharder()])
    on_gpu = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cuda"),
        constraints=models.constraints(),
        debug=False,
    )
    if optimizer is EmbOptimType.LAMB:
        with pytest.raises(ValueError, match="on cuda must be .*PARTIAL_ROWWISE_ADAM, got LAMB"):
            on_gpu.plan(models.collection(), [models.sharder(optimizer)])
    else:
        on_gpu.plan(models.collection(), [models.sharder(optimizer)])


@pytest.mark.parametrize("mode", [WeightDecayMode.COUNTER, WeightDecayMode.DECOUPLE_GLOBAL])
def test_optimizers_that_count_the_updates_of_a_row_are_refused(mode):
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay_mode": mode}
    planner = models.planner(models.constraints(), 1)
    counting = tc.EmbeddingBagCollectionSharder(fused_params=fused)
    with pytest.raises(ValueError, match=f"'t_big': .* got weight_decay_mode={mode.name}, .*L2 or"):
        planner.plan(models.collection(), [counting])
    fused["weight_decay_mode"] = WeightDecayMode.DECOUPLE
    planner.plan(models.collection(), [tc.EmbeddingBagCollectionSharder(fused_params=fused)])


def test_dims_that_fbgemm_cannot_hold_are_refused():
    module = models.collection()
    module.embedding_bag_configs()[0].embedding_dim = 6
    with pytest.raises(ValueError, match="table 't_big': embedding_dim must be a positive"):
        models.planner(models.constraints(), 2).plan(module, [models.sharder()])


def test_a_sharder_that_cannot_compress_is_refused():
    planner = models.planner(models.constraints(), 2)
    with pytest.raises(ValueError, match="must hold a torchrec_cafe.EmbeddingBagCollectionShard"):
        planner.plan(models.collection(), [TorchRecSharder()])


def _stock_sharder_refuses() -> str:
    module = models.collection()
    plan = models.planner(models.constraints()).plan(module, [models.sharder()])
    env = __import__("torchrec.distributed.types", fromlist=["ShardingEnv"]).ShardingEnv
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
        TorchRecSharder().shard(
            module,
            plan.plan[""],
            env.from_process_group(dist.group.WORLD),
            torch.device("cpu"),
        )
    return str(error.value)


def _two_optimizers() -> list[str]:
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer
    from torchrec.optim import RowWiseAdagrad

    sizes = {"t_one": 5000, "t_two": 4000}
    module = models.collection(sizes)
    weights = {name: bag.weight for name, bag in module.embedding_bags.items()}
    apply_optimizer(RowWiseAdagrad, [weights["t_one"]], {"lr": 0.1})
    apply_optimizer(torch.optim.SGD, [weights["t_two"]], {"lr": 0.1})
    constraint = tc.ParameterConstraints(table=models.CAFE)
    model = models.sharded(module, dict.fromkeys(sizes, constraint))
    for batch in models.batches(2, 8, sizes):
        model(batch).values().sum().backward()
    return sorted(name for name in models.local_state(model) if name.endswith(".weight"))


def test_what_cannot_be_sharded_says_so(tmp_path: Path):
    (refusal,) = run_ranks(1, tmp_path / "stock", _stock_sharder_refuses)
    assert "Compute kernel not supported" in refusal


def test_tables_of_two_optimizers_share_no_pool(tmp_path: Path):
    (names,) = run_ranks(1, tmp_path, _two_optimizers)
    assert [name.split(".")[-2] for name in names] == [
        "cafe_pool_t_one", "cafe_pool_t_two", "t_one", "t_two"
    ]  # fmt: skip


def _refused_plan() -> str:
    impossible = {"t_big": tc.ParameterConstraints(table=tc.Cafe(compression=1e6))}
    with pytest.raises(ValueError, match="leaves no row for table 't_big'") as error:
        models.planner(impossible).collective_plan(
            models.collection(), [models.sharder()], dist.group.WORLD
        )
    return str(error.value)


def test_a_refusal_reaches_every_rank(tmp_path: Path):
    first, second = run_ranks(2, tmp_path, _refused_plan)
    assert first == second


def _collective_plan() -> str:
    model = models.sharded(models.collection(), models.constraints())
    return str(model.plan)


def test_ranks_agree_on_the_plan(tmp_path: Path):
    first, second = run_ranks(2, tmp_path, _collective_plan)
    assert first == second
    assert "customized_kernel" in first


def test_look_ahead_tables_are_refused_where_they_cannot_be():
    ahead = tc.Lookahead(cache_fraction=0.1)
    constraint = tc.ParameterConstraints(table=ahead, sharding_types=["column_wise"])
    with pytest.raises(
        ValueError, match=r"table 't_big': a Lookahead table can be sharded row_wise"
    ):
        models.planner({"t_big": constraint}, 2)
    for device, kind, message in (
        ("cuda", dataclasses.replace(ahead, path="/tmp/rows"), "must be in host memory, got path="),
        ("mtia", ahead, "must be on the CPU or on CUDA, got compute_device='mtia'"),
    ):
        elsewhere = tc.EmbeddingShardingPlanner(
            topology=Topology(world_size=2, compute_device=device),
            constraints={"t_big": tc.ParameterConstraints(table=kind)},
            debug=False,
        )
        with pytest.raises(ValueError, match=f"table 't_big': .*{message}"):
            elsewhere.plan(models.collection(), [models.sharder()])


def test_look_ahead_tables_are_planned_on_cuda():
    constraint = tc.ParameterConstraints(table=tc.Lookahead(cache_fraction=0.1, min_slots=1))
    planner = tc.EmbeddingShardingPlanner(
        topology=Topology(world_size=2, compute_device="cuda"),
        constraints={"t_big": constraint},
        debug=False,
    )
    entry = planner.plan(models.collection(), [models.sharder()]).plan[""]["t_big"]
    assert isinstance(entry, CompressedParameterSharding)
    assert entry.group.num_slots == 500
    placements = [str(shard.placement) for shard in entry.sharding_spec.shards]
    assert placements == ["rank:0/cuda:0", "rank:1/cuda:1"]


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_wise", "table_row_wise"])
def test_look_ahead_tables_are_planned_at_their_size(sharding_type):
    kind = tc.Lookahead(min_slots=1)
    ahead = tc.ParameterConstraints(table=kind, sharding_types=[sharding_type])
    plan = models.planner({"t_big": ahead, "t_hash": ahead}, 2).plan(
        models.collection(), [models.sharder()]
    )
    for name in ("t_big", "t_hash"):
        entry = plan.plan[""][name]
        assert isinstance(entry, CompressedParameterSharding)
        assert entry.sharding_type == sharding_type
        shards = entry.sharding_spec.shards
        assert sum(shard.shard_sizes[0] for shard in shards) == models.SIZES[name]
        group = entry.group
        slots = math.ceil(0.05 * 5700)
        assert group.num_slots == slots
        assert group.resident_bytes == slots * (8 * 4 + 100)
        sgd = OptimizerState(0, 0, 8)
        ranks = len(shards)
        on_cpu = plan_table(group, name, ranks, row_bytes=32, state=sgd, on_cpu=True)
        on_cuda = plan_table(group, name, ranks, row_bytes=32, state=sgd, on_cpu=False)
        share = slots * models.SIZES[name] / 5700
        rounding = 132 * 2 * ranks
        assert sum(on_cuda.device) == pytest.approx(share * 32, abs=rounding)
        assert sum(on_cuda.host) == pytest.approx(
            models.SIZES[name] * 32 + share * 100, abs=rounding
        )
        assert sum(on_cpu.device) == sum(on_cuda.device) + sum(on_cuda.host)


@pytest.mark.parametrize(
    "options",
    [
        {"partitioner": MemoryBalancedPartitioner()},
        {"proposer": GreedyProposer()},
        {"proposer": [UniformProposer(), GreedyProposer(use_depth=False)]},
        {"proposer": DynamicProgrammingProposer(), "device": "cuda"},  # of HBM only
        {"proposer": GridSearchProposer(), "performance_model": NoopStorageModel},
        {"stats": [EmbeddingStats()], "debug": True},
    ],
    ids=str,
)
def test_torchrecs_proposers_partitioners_and_stats_work(options: dict[str, Any]):
    options = dict(options)
    topology = Topology(world_size=2, compute_device=options.pop("device", "cpu"))
    if "performance_model" in options:
        options = options | {"performance_model": options["performance_model"](topology)}
    planner = tc.EmbeddingShardingPlanner(
        topology=topology, constraints=models.constraints(), **({"debug": False} | options)
    )
    entries = planner.plan(models.collection(), [models.sharder()]).plan[""]
    assert isinstance(entries["t_big"], CompressedParameterSharding)
    assert planner.report is not None
    kept = {row.table: row.kept for row in planner.report.rows}
    assert kept["t_big"] == str(models.CAFE)
    assert kept["t_fused"] == "fused"
    assert "rank 0: " in str(planner.report)


def test_an_enumerator_of_ones_own_sees_the_bytes():
    topology = Topology(world_size=2, compute_device="cpu")
    constraints: dict[str, Any] = {"t_big": tc.ParameterConstraints(table=models.CAFE)}
    enumerator = EmbeddingEnumerator(topology=topology, batch_size=8, constraints=constraints)
    planner = tc.EmbeddingShardingPlanner(
        topology=topology, constraints=constraints, enumerator=enumerator, debug=False
    )
    entry = planner.plan(models.collection(), [models.sharder()]).plan[""]["t_big"]
    assert isinstance(entry, CompressedParameterSharding)
    assert planner.report is not None
    row = next(row for row in planner.report.rows if row.table == "t_big")
    assert row.device_bytes < row.dense_bytes


def test_our_configuration_is_registered_and_knows_our_kernel():
    topology = Topology(world_size=2, compute_device="cpu")
    estimator = EmbeddingPerfEstimatorFactory.create("torchrec_cafe", topology=topology)
    bandwidths = [
        estimator.config.get_device_bw("cpu", kernel, 1.0, 2.0, 3.0, 4.0)
        for kernel in ("fused", "customized_kernel")
    ]
    assert bandwidths == [2.0, 2.0]
