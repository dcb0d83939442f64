"""Compressed tables under TorchRec's plan, pipeline, optimizers and checkpoints, on gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models, tasks
from tests.distributed.ranks import run_ranks
from torchrec_cafe.ops import MEDIUM


class Regression(nn.Module):
    """Sum of all embeddings, pulled towards one."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = models.collection()
        self.dense = nn.Linear(32, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        prediction = self.dense(self.ebc(features).values()).squeeze(1)
        loss = ((prediction - 1) ** 2).mean()
        return loss, loss.detach()


def _regression(
    optimizer_type: EmbOptimType,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The sharded model, and the optimizer of its tables and its dense layer."""
    model = models.sharded(Regression(), models.constraints(), optimizer_type)
    dense = KeyedOptimizerWrapper(
        {n: p for n, p in model.named_parameters() if "dense" in n},
        lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])


def _train(folder: str, optimizer_type: EmbOptimType) -> dict[str, Any]:
    torch.manual_seed(0)
    model, optimizer = _regression(optimizer_type)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    data = models.batches(60, 32)
    losses = [float(pipeline.progress(data)) for _ in range(60)]
    pipeline.detach()

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    before = models.local_state(model)
    dcp.save(state, checkpoint_id=folder)

    torch.manual_seed(1)
    other, other_optimizer = _regression(optimizer_type)
    loaded: dict[str, Any] = {"model": other.state_dict()}
    if optimizer_type != EmbOptimType.EXACT_SGD:  # which has no state, so that DCP has no key
        loaded["optimizer"] = other_optimizer.state_dict()
    dcp.load(loaded, checkpoint_id=folder)
    other.load_state_dict(loaded["model"])
    if "optimizer" in loaded:
        other_optimizer.load_state_dict(loaded["optimizer"])
    after = models.local_state(other)

    resumed: dict[str, list[float]] = {}
    for name, (trained, step) in {
        "original": (model, optimizer),
        "loaded": (other, other_optimizer),
    }.items():
        resumed[name] = []
        for batch in models.batches(10, 32, seed=1):
            step.zero_grad()
            loss, _ = trained(batch)
            loss.backward()
            step.step()
            resumed[name].append(float(loss))
    return {
        "losses": losses,
        "before": before,
        "after": after,
        "resumed": resumed,
        "continued": (models.local_state(model), models.local_state(other)),
        "statistics": [pool.statistics() for pool in models.pools(model)],
        "resident": tc.resident_bytes(model),
    }


@pytest.mark.parametrize(
    ("optimizer_type", "fall"),
    [
        (EmbOptimType.EXACT_ROWWISE_ADAGRAD, 0.5),
        (EmbOptimType.EXACT_ADAGRAD, 0.5),
        (EmbOptimType.EXACT_SGD, 0.9),
    ],
)
def test_mixed_collection_trains_and_round_trips_through_dcp(
    tmp_path: Path, optimizer_type: EmbOptimType, fall: float
):
    folder = str(tmp_path / "checkpoint")
    results = run_ranks(2, tmp_path / "ranks", _train, folder, optimizer_type)
    for result in results:
        assert sum(result["losses"][-10:]) < fall * sum(result["losses"][:10])
        assert result["before"].keys() == result["after"].keys()
        for name, tensor in result["before"].items():
            assert torch.equal(tensor, result["after"][name]), name
        assert result["resumed"]["original"] == result["resumed"]["loaded"]
        original, loaded = result["continued"]
        for name, tensor in original.items():
            assert torch.equal(tensor, loaded[name]), name
        assert result["statistics"][0]["promoted"] > 0
        assert result["statistics"][0]["non_finite"] == 0
    names = results[0]["before"].keys()
    assert any("cafe_pool_t_big.sketch_buckets" in name for name in names)
    # Bytes by the tensors are the bytes that the kinds have promised.
    promised = (
        models.CAFE.allocate(_shapes("t_big", "t_small")).memory.total_bytes
        + models.HASH.allocate(_shapes("t_hash")).memory.total_bytes
        + models.SIZES["t_fused"] * 8 * 4
    )
    assert sum(result["resident"] for result in results) == promised


def _shapes(*names: str) -> list[Any]:
    from torchrec_cafe.config import TableShape

    return [
        TableShape(name=name, num_embeddings=models.SIZES[name], embedding_dim=8) for name in names
    ]


# All kinds in the same ranks, one after the other: starting ranks takes longer than most of them.
# "mem_rec_sample" takes no weights.
LEARNED = [
    (kind, weighted)
    for kind in models.KINDS
    for weighted in (False, True)
    if not (kind == "mem_rec_sample" and weighted)
]


def _learn_all() -> list[dict[str, Tensor]]:
    return [tasks.learn(kind, weighted) for kind, weighted in LEARNED]


def test_any_number_of_ranks_learns_the_same(tmp_path: Path):
    (alone,) = run_ranks(1, tmp_path / "alone", _learn_all)
    for world_size in (2, 3):
        parts = run_ranks(world_size, tmp_path / f"of_{world_size}", _learn_all)
        for number, case in enumerate(LEARNED):
            _compare(case, alone[number], [part[number] for part in parts])


def _compare(
    case: tuple[str, bool], alone: dict[str, Tensor], parts: list[dict[str, Tensor]]
) -> None:
    """The same, and the sketch bit for bit; ids have become hot, and medium where they can."""
    kind, _ = case
    if any("sketch" in name for name in alone):
        assert (alone["embedding_bags.cafe_pool_t_big.sketch_owners"] >= 0).any(), case
        keys = alone["embedding_bags.cafe_pool_t_big.sketch_buckets"].view(torch.int32)[..., 12:]
        assert (keys == MEDIUM).any() == (kind in ("multi_level", "factors")), case
    for name, whole in alone.items():
        joined = torch.cat([part[name] for part in parts if name in part])
        if "sketch" in name:
            assert torch.equal(joined, whole), (case, name)
        else:
            torch.testing.assert_close(joined, whole, msg=f"{case}: {name}")


def _twice() -> dict[str, bool]:
    """Whether the same training, done twice, gives the same bits, by kind."""
    same = {}
    for kind in models.KINDS:
        states = []
        for _ in range(2):
            torch.manual_seed(0)
            model = tasks.all_of(kind, EmbOptimType.EXACT_ROWWISE_ADAGRAD)
            for batch in models.batches(30, 24, tasks.SIZES):
                model(batch).values().pow(2).sum().backward()
            states.append(models.local_state(model))
        same[kind] = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return same


def test_the_same_seed_gives_the_same_bits(tmp_path: Path):
    for same in run_ranks(2, tmp_path, _twice):
        assert all(same.values()), same


def _accumulated() -> tuple[list[int], dict[str, float]]:
    """Two backward passes for every step of the dense optimizer, under autocast."""
    torch.manual_seed(0)
    model, optimizer = _regression(EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    data = list(models.batches(40, 32))
    losses = []
    for first, second in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        for batch in (first, second):
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = model(batch)
            loss.backward()
            losses.append(float(loss))
        optimizer.step()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    (pool,) = models.pools(model)
    return pool.sketch.steps.unique().tolist(), pool.statistics()


def test_gradient_accumulation_and_autocast(tmp_path: Path):
    for steps, statistics in run_ranks(2, tmp_path, _accumulated):
        assert steps == [40]  # every backward pass teaches
        assert statistics["promoted"] > 0
        assert statistics["non_finite"] == 0
        assert 0 < statistics["hot_share"] <= 1


@pytest.mark.parametrize("weighted", [False, True])
def test_row_wise_pooling_equals_the_unsharded_module(tmp_path: Path, weighted: bool):
    for sharded, unsharded in run_ranks(2, tmp_path, tasks.pooled, "row_wise", weighted):
        torch.testing.assert_close(sharded, unsharded)


def _odd_batches() -> dict[str, Any]:
    model = models.sharded(models.collection(), models.constraints())
    keys = [name.replace("t_", "f_") for name in models.SIZES]
    empty = KeyedJaggedTensor(
        keys=keys,
        values=torch.empty(0, dtype=torch.int64),
        lengths=torch.zeros(4 * len(keys), dtype=torch.int64),
        stride=4,
    )
    before = models.local_state(model)
    pooled = model(empty).values()
    pooled.sum().backward()
    after = models.local_state(model)
    no_samples = KeyedJaggedTensor(
        keys=keys,
        values=torch.empty(0, dtype=torch.int64),
        lengths=torch.empty(0, dtype=torch.int64),
        stride=0,
    )
    none = model(no_samples).values()
    none.sum().backward()

    model.eval()
    quiet = models.local_state(model)
    for batch in models.batches(2, 8):
        model(batch).values().sum().backward()
    in_eval = models.local_state(model)
    return {
        "shape": tuple(pooled.shape),
        "zero": bool((pooled == 0).all()),
        "weights": all(
            torch.equal(before[name], after[name]) for name in before if "weight" in name
        ),
        "no_samples": tuple(none.shape),
        "eval_learns": any(
            not torch.equal(quiet[name], in_eval[name]) for name in quiet if "sketch" in name
        ),
    }


def test_empty_bags_empty_batches_and_eval_mode(tmp_path: Path):
    for result in run_ranks(2, tmp_path, _odd_batches):
        assert result == {
            "shape": (4, 32),
            "zero": True,
            "weights": True,
            "no_samples": (0, 32),
            "eval_learns": False,
        }


def _narrow_ids() -> tuple[bool, str]:
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

    sizes = {"t_big": 5000, "t_small": 12}
    outputs = []
    strict = {
        name: tc.ParameterConstraints(table=models.CAFE, bounds_check_mode=BoundsCheckMode.FATAL)
        for name in sizes
    }
    model = models.sharded(models.collection(sizes), strict)
    for batch in models.batches(1, 16, sizes):
        outputs.append(model(batch).values().detach())
        narrow = KeyedJaggedTensor(
            keys=batch.keys(), values=batch.values().int(), lengths=batch.lengths().int()
        )
        outputs.append(model(narrow).values().detach())
        bad = KeyedJaggedTensor(
            keys=batch.keys(), values=batch.values() + 4999, lengths=batch.lengths()
        )
        with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
            model(bad)
    return torch.equal(outputs[0], outputs[1]), str(error.value)


def test_int32_ids_and_ids_out_of_range(tmp_path: Path):
    for same, message in run_ranks(1, tmp_path, _narrow_ids):
        assert same
        assert message.startswith("table 't_big': ids must be in [0, num_embeddings), got ")
