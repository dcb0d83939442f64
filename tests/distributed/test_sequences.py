"""``EmbeddingCollection`` with compressed tables on gloo ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models, sequences, tasks
from tests.distributed.ranks import run_ranks
from torchrec_cafe.ops import MEDIUM
from torchrec_cafe.tables.hot_rows import NORM_DECAY

ROWWISE = EmbOptimType.EXACT_ROWWISE_ADAGRAD


def test_any_number_of_ranks_learns_the_same(tmp_path: Path):
    (alone,) = run_ranks(1, tmp_path / "alone", sequences.learn_all, sequences.KINDS, "row_wise")
    for world_size, sharding_type in ((2, "row_wise"), (2, "table_wise"), (3, "row_wise")):
        folder = tmp_path / f"{sharding_type}_{world_size}"
        parts = run_ranks(world_size, folder, sequences.learn_all, sequences.KINDS, sharding_type)
        for kind, expected in alone.items():
            _compare(kind, expected, tasks.joined([part[kind] for part in parts]))


def _compare(kind: str, alone: dict[str, Tensor], joined: dict[str, Tensor]) -> None:
    """The same, and the sketch bit for bit; ids have become hot, and medium where they can."""
    assert joined.keys() == alone.keys()
    pool = "embeddings.cafe_pool_t_big.sketch_"
    if f"{pool}owners" in alone:
        assert (alone[f"{pool}owners"] >= 0).sum() > 10, kind
        keys = alone[f"{pool}buckets"].view(torch.int32)[..., 12:]
        assert (keys == MEDIUM).any() == (kind in ("multi_level", "factors")), kind
    for name, whole in alone.items():
        if "sketch" in name:
            assert torch.equal(joined[name], whole), (kind, name)
        else:
            torch.testing.assert_close(joined[name], whole, msg=f"{kind}: {name}")


def _looked_up() -> dict[str, float]:
    """How far vectors are from those that the tables are said to have, while they train."""
    furthest = {}
    for kind in sequences.KINDS:
        for sharding_type in ("row_wise", "table_wise"):
            model = sequences.all_of(kind, ROWWISE, sharding_type, need_indices=True)
            worst = 0.0
            for step, batch in enumerate(models.batches(12, 24, sequences.SIZES, weighted=True)):
                found = model(batch)
                if step % 4 == 3:
                    # What the last step has taught is applied before lookups, as `model` has done.
                    tables = tc.gather_tables(model)
                    for name, table in tables.items():
                        key = name.replace("t_", "f_")
                        expected = table.vectors(batch[key].values())
                        worst = max(worst, _distance(found[key].values(), expected))
                for key in batch.keys():  # noqa: SIM118  it is no mapping
                    assert torch.equal(found[key].lengths(), batch[key].lengths())
                    assert torch.equal(found[key].weights(), batch[key].values())
                sequences.vectors(found, batch).pow(2).sum().backward()
            furthest[f"{kind}, {sharding_type}"] = worst
            if kind == "factors":
                (statistics,) = tc.pool_statistics(model).values() or [{"hot_occupancy": 1.0}]
                assert statistics["hot_occupancy"] > 0
    return furthest


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other).abs().max()) if one.numel() else 0.0


def test_vectors_are_those_of_the_tables(tmp_path: Path):
    for furthest in run_ranks(2, tmp_path, _looked_up):
        assert max(furthest.values()) < 1e-6, furthest


def _whole(sharding_type: str) -> tuple[Tensor, Tensor]:
    """A collection in which every id has its row, trained sharded and in plain PyTorch."""
    constraint = tc.ParameterConstraints(
        table=tc.Hash(compression=1), sharding_types=[sharding_type]
    )
    sizes = {"t_one": 50, "t_two": 31}
    torch.manual_seed(0)
    plain = sequences.collection(sizes, device="cpu")
    model = sequences.sharded(
        sequences.collection(sizes), dict.fromkeys(sizes, constraint), EmbOptimType.EXACT_SGD
    )
    models.set_weights(model)
    for name, table in tc.gather_tables(model).items():
        plain.embeddings[name].weight.data.copy_(table.vectors(torch.arange(sizes[name])))
    found, expected = [], []
    for batch in models.batches(5, 16, sizes):
        found.append(sequences.vectors(model(batch), batch))
        (found[-1] ** 2).sum().backward()
        expected.append(sequences.vectors(plain(batch), batch))
        (expected[-1] ** 2).sum().backward()
        for weight in plain.parameters():
            assert weight.grad is not None
            # Every rank trains the whole with its part of the batch; TorchRec averages.
            dist.all_reduce(weight.grad)
            weight.data -= 0.1 * weight.grad / dist.get_world_size()
            weight.grad = None
    return torch.cat(found).detach(), torch.cat(expected).detach()


def _whole_both() -> list[tuple[Tensor, Tensor]]:
    return [_whole("row_wise"), _whole("table_wise")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_tables_train_as_the_unsharded_module(tmp_path: Path, world_size: int):
    for results in run_ranks(world_size, tmp_path, _whole_both):
        for sharded, unsharded in results:
            torch.testing.assert_close(sharded, unsharded)


def _stock(*, ours: bool) -> tuple[str, dict[str, Tensor], Tensor]:
    """A collection without kinds, by our sharder and planner or TorchRec's."""
    torch.manual_seed(0)
    constraints = {
        name: tc.ParameterConstraints(sharding_types=[sharding_type])
        for name, sharding_type in (("t_big", "row_wise"), ("t_small", "table_wise"))
    }
    sharder = sequences.sharder()
    stock: Any = EmbeddingCollectionSharder(fused_params=dict(sharder.fused_params or {}))
    planner: Any = tc.EmbeddingShardingPlanner if ours else EmbeddingShardingPlanner
    sharders: list[Any] = [sharder if ours else stock]
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    module = sequences.collection()
    plan = planner(topology=topology, constraints=constraints, debug=False).collective_plan(
        module, sharders, dist.group.WORLD
    )
    model = DistributedModelParallel(
        module, plan=plan, sharders=sharders, device=torch.device("cpu")
    )
    found = []
    for batch in models.batches(5, 24, sequences.SIZES):
        found.append(sequences.vectors(model(batch), batch))
        found[-1].pow(2).sum().backward()
    return type(model.module).__name__, models.local_state(model), torch.cat(found).detach()


def _both_stock() -> list[tuple[str, dict[str, Tensor], Tensor]]:
    return [_stock(ours=True), _stock(ours=False)]


def test_a_collection_without_kinds_is_torchrecs_bit_for_bit(tmp_path: Path):
    for ours, torchrecs in run_ranks(2, tmp_path, _both_stock):
        assert ours[0] == torchrecs[0] == ShardedEmbeddingCollection.__name__
        assert ours[1].keys() == torchrecs[1].keys()
        for name, value in torchrecs[1].items():
            assert torch.equal(ours[1][name], value), name
        assert torch.equal(ours[2], torchrecs[2])


def _shared_table(sharding_type: str) -> None:
    """A table that two features look into, as histories and candidates do."""
    module = sequences.collection({"t_big": 5000, "t_small": 12})
    module.embedding_configs()[0].feature_names.append("f_candidate")
    module = EmbeddingCollection(tables=module.embedding_configs(), device=torch.device("meta"))
    constraint = tc.ParameterConstraints(
        table=models.KINDS["factors"], sharding_types=[sharding_type]
    )
    model = sequences.sharded(module, dict.fromkeys(sequences.SIZES, constraint))
    seen = 0.0
    for batch in models.batches(10, 24, sequences.SIZES):
        history, other = batch["f_big"], batch["f_small"]
        twice = KeyedJaggedTensor(
            keys=["f_candidate", "f_small", "f_big"],
            values=torch.cat([history.values(), other.values(), history.values()]),
            lengths=torch.cat([history.lengths(), other.lengths(), history.lengths()]),
        )
        found = model(twice)
        assert torch.equal(found["f_big"].values(), found["f_candidate"].values())
        sequences.vectors(found, twice).pow(2).sum().backward()
        seen = NORM_DECAY * seen + 2 * len(history.values())
    # Both features' ids count, wherever their shards are.
    counted = sum(
        float(pool.state_tensors()["sketch_norms"][:, 0, 1].sum()) for pool in models.pools(model)
    )
    totals = torch.tensor([seen, counted], dtype=torch.float64)
    dist.all_reduce(totals)
    torch.testing.assert_close(totals[0], totals[1])


def test_features_of_one_table_share_its_rows(tmp_path: Path):
    run_ranks(1, tmp_path / "alone", _shared_table, "row_wise")
    run_ranks(2, tmp_path / "row_wise", _shared_table, "row_wise")
    run_ranks(2, tmp_path / "table_wise", _shared_table, "table_wise")


class Ranking(nn.Module):
    """Sequences and bags in one model: the mean of a history against a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences = sequences.collection({"t_big": 5000, "t_small": 12, "t_fused": 97})
        self.bags = models.collection({"t_hash": 700})
        self.dense = nn.Linear(32, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        found, bags = self.sequences(features), self.bags(features)
        means = []
        for key in ("f_big", "f_small", "f_fused"):
            lengths = found[key].lengths()
            mean = torch.segment_reduce(found[key].values(), "mean", lengths=lengths, initial=0)
            means.append(mean)
        prediction = self.dense(torch.cat([*means, bags.values()], 1)).squeeze(1)
        loss = ((prediction - 1) ** 2).mean()
        return loss, loss.detach()


def ranking() -> tuple[DistributedModelParallel, CombinedOptimizer]:
    model = sequences.sharded(Ranking(), models.constraints())
    dense = KeyedOptimizerWrapper(
        {n: p for n, p in model.named_parameters() if "dense" in n},
        lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])


def _pipelined() -> dict[str, Any]:
    torch.manual_seed(0)
    model, optimizer = ranking()
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    data = models.batches(60, 32)
    losses = [float(pipeline.progress(data)) for _ in range(60)]
    pipeline.detach()
    return {
        "losses": losses,
        "resident": tc.resident_bytes(model),
        "statistics": tc.pool_statistics(model),
        "names": sorted(models.local_state(model)),
    }


def test_a_model_of_sequences_and_bags_trains_in_torchrecs_pipeline(tmp_path: Path):
    results = run_ranks(2, tmp_path, _pipelined)
    shapes = {name: _shape(name) for name in ("t_big", "t_small", "t_hash")}
    promised = (
        models.CAFE.allocate([shapes["t_big"], shapes["t_small"]]).memory.total_bytes
        + models.HASH.allocate([shapes["t_hash"]]).memory.total_bytes
        + 97 * 8 * 4
    )
    assert sum(result["resident"] for result in results) == promised
    for result in results:
        assert sum(result["losses"][-10:]) < 0.5 * sum(result["losses"][:10])
        assert result["statistics"]["cafe_pool_t_big"]["promoted"] > 0
        assert result["statistics"]["cafe_pool_t_big"]["non_finite"] == 0
        assert 0 < result["statistics"]["cafe_pool_t_big"]["hot_share"] <= 1
    names = {name for result in results for name in result["names"]}
    assert "sequences.embeddings.cafe_pool_t_big.sketch_buckets" in names
    assert "bags.embedding_bags.t_hash.weight" in names


def _shape(name: str) -> Any:
    from torchrec_cafe.config import TableShape

    return TableShape(name=name, num_embeddings=models.SIZES[name], embedding_dim=8)


def _odd_batches() -> dict[str, Any]:
    kinds = {"t_big": "factors", "t_small": "mem_rec", "t_hash": "quotient_remainder"}
    constraints = {
        name: tc.ParameterConstraints(table=dataclasses.replace(models.KINDS[kind]))
        for name, kind in kinds.items()
    }
    sizes = dict.fromkeys(kinds, 5000)
    model = sequences.sharded(sequences.collection(sizes), constraints)
    keys = [name.replace("t_", "f_") for name in sizes]
    empty = KeyedJaggedTensor(
        keys=keys,
        values=torch.empty(0, dtype=torch.int64),
        lengths=torch.zeros(4 * len(keys), dtype=torch.int64),
        stride=4,
    )
    before = models.local_state(model)
    found = model(empty)
    sequences.vectors(found, empty).sum().backward()
    after = models.local_state(model)
    # One rank has no samples, another some.
    (batch,) = models.batches(1, 8, sizes)
    mine = batch if dist.get_rank() == 0 else sequences.no_samples(keys)
    looked = model(mine)
    some = sequences.vectors(looked, mine)
    some.sum().backward()

    model.eval()
    quiet = models.local_state(model)
    for batch in models.batches(2, 8, sizes):
        sequences.vectors(model(batch), batch).sum().backward()
    in_eval = models.local_state(model)
    return {
        "empty": [(tuple(v.values().shape), v.lengths().tolist()) for v in found.values()],
        "weights": all(
            torch.equal(before[name], after[name]) for name in before if "weight" in name
        ),
        "some": tuple(some.shape) == (mine.values().numel(), 8),
        "samples": {len(of_feature.lengths()) == mine.stride() for of_feature in looked.values()},
        "eval_learns": any(
            not torch.equal(quiet[name], in_eval[name]) for name in quiet if "sketch" in name
        ),
    }


def test_empty_bags_ranks_without_samples_and_eval_mode(tmp_path: Path):
    for result in run_ranks(2, tmp_path, _odd_batches):
        assert result == {
            "empty": [((0, 8), [0, 0, 0, 0])] * 3,
            "weights": True,
            "some": True,
            "samples": {True},
            "eval_learns": False,
        }


def _odd_ids() -> tuple[bool, list[str]]:
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

    strict = tc.ParameterConstraints(table=models.CAFE, bounds_check_mode=BoundsCheckMode.FATAL)
    model = sequences.sharded(sequences.collection(), dict.fromkeys(sequences.SIZES, strict))
    (batch,) = models.batches(1, 16, sequences.SIZES)
    keys, values, lengths = batch.keys(), batch.values(), batch.lengths()
    wide = sequences.vectors(model(batch), batch).detach()
    narrow = KeyedJaggedTensor(keys=keys, values=values.int(), lengths=lengths.int())
    same = torch.equal(sequences.vectors(model(narrow), narrow).detach(), wide)
    messages = []
    for bad in (
        KeyedJaggedTensor(keys=keys, values=values + 4999, lengths=lengths),
        KeyedJaggedTensor(keys=keys, values=values, lengths=lengths + 1),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
            model(bad)
        messages.append(str(error.value))
    return same, messages


def test_int32_ids_and_bad_batches(tmp_path: Path):
    for same, messages in run_ranks(1, tmp_path, _odd_ids):
        assert same
        assert messages[0].startswith("table 't_big': ids must be in [0, num_embeddings), got ")
        assert "lengths of bags must add up" in messages[1]
