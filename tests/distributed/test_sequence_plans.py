"""Plans of sequences with compressed tables: what they cost, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import Topology
from torchrec.distributed.types import ShardingType

import torchrec_cafe as tc
from tests.distributed import models, sequences
from tests.distributed.ranks import run_ranks
from torchrec_cafe.config import Lookahead, TableShape
from torchrec_cafe.distributed import CompressedParameterSharding
from torchrec_cafe.distributed.grouping import default_sharders


def plan(constraints: dict[str, Any], *, world_size: int = 2, **options: Any) -> Any:
    sharders: list[Any] = [sequences.sharder(**options)]
    return models.planner(constraints, world_size).plan(sequences.collection(), sharders).plan[""]


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_wise"])
@pytest.mark.parametrize("kind", sequences.KINDS)
def test_the_plan_has_what_was_asked_and_counts_its_bytes(kind: str, sharding_type: str):
    table = models.KINDS[kind]
    constraint = tc.ParameterConstraints(table=table, sharding_types=[sharding_type])
    planner = models.planner(dict.fromkeys(sequences.SIZES, constraint), 2)
    entries: Any = planner.plan(sequences.collection(), [sequences.sharder()]).plan[""]
    for entry in entries.values():
        assert isinstance(entry, CompressedParameterSharding)
        assert entry.kind == table
        assert entry.sharding_type == sharding_type
    assert planner.report is not None
    shapes = [
        TableShape(name=name, num_embeddings=size, embedding_dim=8)
        for name, size in sequences.SIZES.items()
    ]
    resident = table.allocate(shapes).memory.total_bytes  # and 4 bytes of Adagrad for each row
    rows = resident / 32
    counted = sum(row.device_bytes for row in planner.report.rows)
    assert resident < counted < resident + 8 * rows + 2**20
    assert [row.table for row in planner.report.rows] == list(sequences.SIZES)


def test_tables_are_row_wise_unless_asked_and_others_are_torchrecs():
    entries = plan({"t_big": tc.ParameterConstraints(table=models.CAFE)})
    assert entries["t_big"].sharding_type == "row_wise"
    assert not isinstance(entries["t_small"], CompressedParameterSharding)
    offered = EmbeddingCollectionSharder().sharding_types("cpu")
    assert entries["t_small"].sharding_type in offered


def test_a_model_that_does_not_fit_dense_fits_compressed():
    module = sequences.collection({"t_big": 2_000_000})
    topology = Topology(world_size=1, compute_device="cpu", ddr_cap=40 * 2**20)
    dense = tc.EmbeddingShardingPlanner(topology=topology, debug=False)
    with pytest.raises(Exception, match="(?i)unable to find a plan|storage|reservation"):
        dense.plan(module, [sequences.sharder()])
    found: Any = tc.EmbeddingShardingPlanner(
        topology=topology,
        constraints={"t_big": tc.ParameterConstraints(table=tc.Cafe(compression=100))},
        debug=False,
    ).plan(module, [sequences.sharder()])
    assert isinstance(found.plan[""]["t_big"], CompressedParameterSharding)


@pytest.mark.parametrize(
    ("kind", "sharding_types", "message"),
    [
        (
            Lookahead(cache_fraction=0.5),
            None,
            "table 't_big': Lookahead tables must be in an EmbeddingBagCollection, .*use Cafe",
        ),
        (
            models.KINDS["mem_rec_sample"],
            None,
            r"table 't_big': .*vector of its own, .*use MemRec\(per='token'\)",
        ),
        (
            models.CAFE,
            ["table_row_wise"],
            "'t_big': a Cafe table of an EmbeddingCollection can be sharded row_wise or table_wise",
        ),
        (
            models.KINDS["mem_rec"],
            ["data_parallel"],
            "'t_big': a MemRec table of an EmbeddingCollection can be sharded row_wise or table",
        ),
        (
            models.CAFE,
            ["column_wise"],
            "table 't_big': a Cafe table can be sharded row_wise or",
        ),
    ],
)
def test_what_a_table_cannot_be_is_refused(
    kind: Any, sharding_types: list[str] | None, message: str
):
    constraint = tc.ParameterConstraints(table=kind, sharding_types=sharding_types)
    with pytest.raises(ValueError, match=message):
        plan({"t_big": constraint})


def test_deduplicated_ids_are_refused():
    constraint = tc.ParameterConstraints(table=models.CAFE)
    with pytest.raises(ValueError, match=r"tables \['t_big'\]: .*use_index_dedup=True"):
        plan({"t_big": constraint}, use_index_dedup=True)
    plan({}, use_index_dedup=True)


def test_each_collection_needs_its_sharder():
    constraints = {"t_big": tc.ParameterConstraints(table=models.CAFE)}
    planner = models.planner(constraints, 2)
    with pytest.raises(ValueError, match="must hold a torchrec_cafe.EmbeddingCollectionSharder"):
        planner.plan(sequences.collection(), [EmbeddingCollectionSharder(), models.sharder()])
    with pytest.raises(ValueError, match="which no EmbeddingBagCollection or EmbeddingCollection"):
        models.planner({"t_other": constraints["t_big"]}, 2).plan(
            sequences.collection(), [sequences.sharder()]
        )
    module = nn.ModuleList([sequences.collection(), models.collection({"t_big": 5000})])
    with pytest.raises(ValueError, match="'t_big': two collections have one of that name"):
        planner.plan(module, [sequences.sharder(), models.sharder()])


def test_the_default_sharders_know_sequences():
    found = models.planner({"t_big": tc.ParameterConstraints(table=models.CAFE)}, 2).plan(
        sequences.collection(), default_sharders()
    )
    entries: Any = found.plan[""]
    assert isinstance(entries["t_big"], CompressedParameterSharding)


def test_auto_leaves_sequences_to_torchrec_unless_asked():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = models.collection({"t_bag": 100_000})
            self.asked = sequences.collection({"t_asked": 100_000})
            self.free = sequences.collection({"t_free": 1000})

    topology = Topology(world_size=1, compute_device="cpu", ddr_cap=8 * 2**20)
    planner = tc.EmbeddingShardingPlanner(
        topology=topology,
        constraints={"t_asked": tc.ParameterConstraints(table=tc.Cafe(compression=100))},
        auto=tc.Auto(),
        batch_size=64,
        debug=False,
    )
    entries: Any = planner.plan(Both(), [sequences.sharder(), models.sharder()]).plan
    assert isinstance(entries["asked"]["t_asked"], CompressedParameterSharding)
    assert not isinstance(entries["free"]["t_free"], CompressedParameterSharding)
    assert planner.report is not None
    assert {row.table for row in planner.report.rows} == {"t_bag", "t_asked", "t_free"}


def _refused_by_exports() -> list[str]:
    model: Any = sequences.all_of("cafe", sequences.EmbOptimType.EXACT_SGD)
    messages = []
    for call in (
        lambda: tc.to_inference(model, sequences.collection()),
        lambda: tc.DeltaTracker(model),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
            call()
        messages.append(str(error.value))
    return messages


def test_what_serves_bags_only_says_so(tmp_path: Path):
    (messages,) = run_ranks(1, tmp_path, _refused_by_exports)
    for message, who in zip(messages, ("to_inference serves", "a DeltaTracker"), strict=True):
        assert message.startswith(f"tables ['t_big', 't_small']: {who}")
        assert "dense_state_dict" in message


def test_kinds_that_replicate_do_not_here():
    for table in (models.CAFE, models.KINDS["mem_rec"]):
        constraint = tc.ParameterConstraints(table=table)
        entry = plan({"t_big": constraint})["t_big"]
        assert entry.sharding_type == ShardingType.ROW_WISE.value
        assert entry.sharding_spec is not None
        assert torch.device("cpu") == entry.sharding_spec.shards[0].placement.device()
