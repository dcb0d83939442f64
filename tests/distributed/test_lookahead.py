"""Look-ahead tables on gloo ranks: TorchRec's own tables to the last bit, under any pipeline."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    WeightDecayMode,
)
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from torchrec_cafe.tables import ScratchpadFullError

SIZES = {"t_a": 1500, "t_b": 300, "t_c": 70}
KIND = tc.Lookahead(cache_fraction=0.3, min_slots=1)
SHARDING_TYPES = ["row_wise", "table_wise", "table_row_wise"]
#: how a model is trained: by hand, by TorchRec's pipeline, or by ours of some depth
DRIVERS = ("loop", "torchrec", 1, 4)
CPU = torch.device("cpu")


class Net(nn.Module):
    """Embeddings and a layer on top, as a pipeline wants them: a loss, and something else."""

    def __init__(self, ebc: EmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = ebc
        self.over = nn.Linear(8 * len(ebc.embedding_bag_configs()), 1)

    def forward(self, batch: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        click = self.over(self.ebc(batch).values()).squeeze(1)
        return (click - 1).pow(2).mean(), click


def sharded(
    kind: tc.Lookahead | None,
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    sharding_type: str = "row_wise",
    device: torch.device = CPU,
    **options: Any,
) -> DistributedModelParallel:
    """A net whose tables look ahead, or TorchRec's own tables with the same plan."""
    torch.manual_seed(0)
    net = Net(models.collection(SIZES, device="cpu", **options)).to(device)
    constraint = tc.ParameterConstraints(table=kind or KIND, sharding_types=[sharding_type])
    constraints = dict.fromkeys(SIZES, constraint)
    sharders: list[Any] = [models.sharder(optimizer)]
    planner = models.planner(constraints, compute_device=device.type)
    plan = planner.collective_plan(net, sharders, dist.group.WORLD)
    if kind is None:  # TorchRec's planner has no row-wise tables on a CPU
        fields = ParameterSharding.__dataclass_fields__
        for tables in plan.plan.values():
            for name, entry in list(tables.items()):
                values = {field: getattr(entry, field) for field in fields}
                tables[name] = ParameterSharding(**values | {"compute_kernel": "fused"})
    model = DistributedModelParallel(net, plan=plan, sharders=sharders, device=device)
    models.set_weights(model)
    return model


def dense_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    dense = [parameter for name, parameter in model.named_parameters() if "over" in name]
    return torch.optim.SGD(dense, lr=0.1)


def train(model: nn.Module, driver: str | int, data: list[KeyedJaggedTensor]) -> Tensor:
    """What the model says about each batch while it trains."""
    optimizer = dense_optimizer(model)
    device = next(parameter for parameter in model.parameters() if parameter.dim() == 1).device
    said = []
    if driver == "loop":
        for batch in data:
            optimizer.zero_grad()
            loss, click = model(batch.to(device))
            loss.backward()
            optimizer.step()
            said.append(click.detach())
        return torch.stack(said)
    if driver == "torchrec":
        pipeline = TrainPipelineSparseDist(model, optimizer, device)
    elif driver == "prefetch":  # on CUDA
        pipeline = PrefetchTrainPipelineSparseDist(model, optimizer, device)
    else:
        pipeline = tc.LookaheadTrainPipeline(model, optimizer, device, depth=int(driver))
    batches = iter(data)
    for _ in data:
        said.append(pipeline.progress(batches).detach())
    with pytest.raises(StopIteration):
        pipeline.progress(batches)
    pipeline.detach()
    return torch.stack(said)


def everything(model: DistributedModelParallel) -> dict[str, Tensor]:
    """This rank's weights and optimizer states."""
    state = models.local_state(model)
    for name, states in model.fused_optimizer.state_dict()["state"].items():
        for key, value in states.items():
            for shard in value.local_shards() if hasattr(value, "local_shards") else []:
                state[f"{name}.{key}"] = shard.tensor.clone()
    return state


def _against_torchrec(sharding_type: str) -> list[str]:
    """What differs, for all optimizers, poolings and pipelines."""
    differs = []
    data = list(models.batches(30, 24 // dist.get_world_size(), SIZES))
    for optimizer in optimizers():
        for pooling in (PoolingType.SUM, PoolingType.MEAN):
            options: dict[str, Any] = {"sharding_type": sharding_type, "pooling": pooling}
            whole = sharded(None, optimizer, **options)
            said = train(whole, "loop", data)
            expected = everything(whole)
            for driver in DRIVERS:
                model = sharded(KIND, optimizer, **options)
                case = f"{optimizer.name}, {pooling.name}, {driver}"
                if not torch.equal(train(model, driver, data), said):
                    differs.append(f"{case}: outputs")
                got = everything(model)
                assert got.keys() == expected.keys()
                differs += [f"{case}: {n}" for n in got if not torch.equal(got[n], expected[n])]
                for statistics in tc.lookahead_statistics(model).values():
                    ahead = isinstance(driver, int)
                    if (statistics.critical_misses == 0) != ahead:
                        differs.append(f"{case}: {statistics}")
    return differs


def optimizers() -> tuple[EmbOptimType, ...]:
    return (
        EmbOptimType.EXACT_SGD,
        EmbOptimType.EXACT_ADAGRAD,
        EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    )


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_any_pipeline_gives_torchrecs_tables(tmp_path: Path, world_size: int, sharding_type: str):
    for differs in run_ranks(world_size, tmp_path, _against_torchrec, sharding_type):
        assert differs == []


def _evaluate_between(folder: str) -> bool:
    """Training with evaluations and checkpoints in mid-stream, with files for tables."""
    data = list(models.batches(20, 12, SIZES))
    others = list(models.batches(20, 12, SIZES, seed=1))
    results = []
    for kind in (None, dataclasses.replace(KIND, path=f"{folder}/tables")):
        model = sharded(kind)
        optimizer = dense_optimizer(model)
        pipeline = tc.LookaheadTrainPipeline(model, optimizer, CPU, depth=3)
        batches, said = iter(data), []
        for number in range(20):
            said.append(pipeline.progress(batches).detach())
            if number % 6 == 5:
                said.append(_evaluate(pipeline, model, others[number]))
            if number == 9:
                dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/{kind is None}")
        results.append((torch.stack(said), everything(model)))
    (said, expected), (ours, got) = results
    return torch.equal(said, ours) and all(torch.equal(got[n], expected[n]) for n in expected)


def _evaluate(pipeline: Any, model: nn.Module, batch: KeyedJaggedTensor) -> Tensor:
    pipeline.detach()
    model.eval()
    with torch.no_grad():
        _, click = model(batch)
    model.train()
    pipeline.attach(model)
    return click


def _load(folder: str) -> dict[str, Tensor]:
    """Load what whole tables, and what look-ahead tables have saved, into the other."""
    loaded = {}
    # The smallest table is alone on a rank, whose slots must hold a batch of its rows.
    for kind, saved in ((tc.Lookahead(cache_fraction=0.3, min_slots=45), True), (None, False)):
        model = sharded(kind, sharding_type="table_wise")
        train(model, "loop", list(models.batches(3, 12, SIZES, seed=2)))
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{saved}")
        model.load_state_dict(state["model"])
        train(model, 2 if kind else "loop", list(models.batches(6, 12, SIZES, seed=3)))
        loaded[str(kind is None)] = everything(model)
    return loaded


def test_evaluation_files_and_checkpoints_in_mid_stream(tmp_path: Path):
    assert all(run_ranks(2, tmp_path / "save", _evaluate_between, str(tmp_path)))
    assert (tmp_path / "tables" / "t_a" / "rank_1" / "weights").exists()
    # The checkpoints are the same, and load into either kind of table, on more ranks.
    for loaded in run_ranks(3, tmp_path / "load", _load, str(tmp_path)):
        whole, ours = loaded["True"], loaded["False"]
        assert whole.keys() == ours.keys()
        for name in whole:
            if "momentum" not in name:  # model.state_dict() has no optimizer state
                torch.testing.assert_close(whole[name], ours[name], msg=name)


def _mixed() -> list[bool]:
    """All kinds in one collection, under our pipeline and by hand."""
    said = []
    constraints = models.constraints() | {
        "t_mem_rec": tc.ParameterConstraints(table=models.KINDS["mem_rec"]),
        "t_ahead": tc.ParameterConstraints(table=KIND),
        "t_other": tc.ParameterConstraints(table=dataclasses.replace(KIND, cache_fraction=0.5)),
    }
    sizes = models.SIZES | {"t_mem_rec": 900, "t_ahead": 800, "t_other": 90}
    for driver in ("loop", 3):
        torch.manual_seed(0)
        model = models.sharded(Net(models.collection(sizes, device="cpu")), constraints)
        models.set_weights(model)
        said.append(train(model, driver, list(models.batches(25, 12, sizes))))
    assert len(tc.lookahead_statistics(model)) == 2
    return [torch.equal(*said), bool(said[0].isfinite().all())]


def test_all_kinds_mix_under_the_pipeline(tmp_path: Path):
    for result in run_ranks(2, tmp_path, _mixed):
        assert result == [True, True]


def _plan_and_bounds() -> None:
    model = sharded(KIND, sharding_type="table_wise")
    rows = sum(SIZES.values())
    slots = math.ceil(0.3 * rows)
    kernel = next(
        kernel
        for module in model.modules()
        if hasattr(module, "lookahead_kernels")
        for kernel in module.lookahead_kernels()
    )
    assert len(kernel.emb_module.physical_tensors()[0]) == slots
    assert [len(weights) for weights in kernel.split_embedding_weights()] == list(SIZES.values())
    map_bytes = kernel.bags.resident_bytes - slots * 8 * 4
    assert 0 < map_bytes <= slots * 100 + 64 * 80
    assert tc.resident_bytes(model) == kernel.bags.resident_bytes
    bad = KeyedJaggedTensor(
        keys=[name.replace("t_", "f_") for name in SIZES],
        values=torch.tensor([0, 10**9, 3]),
        lengths=torch.ones(3, dtype=torch.int64),
    )
    model(bad)  # a warning, and id 0
    fused = {"bounds_check_mode": BoundsCheckMode.FATAL, "learning_rate": 0.1}
    constraints = dict.fromkeys(SIZES, tc.ParameterConstraints(table=KIND))
    collection = models.collection(SIZES)
    sharders: list[Any] = [tc.EmbeddingBagCollectionSharder(fused_params=fused)]
    plan = models.planner(constraints).collective_plan(collection, sharders, dist.group.WORLD)
    strict = DistributedModelParallel(collection, plan=plan, sharders=sharders, device=CPU)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"table 't_b': ids must be in \[0, num_embeddings\)"):
            strict(bad)
        strict(next(models.batches(1, 4, SIZES)))  # good batches go on
    counts: dict[str, Any] = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay": 0.1}
    counts["weight_decay_mode"] = WeightDecayMode.COUNTER
    counts["counter_based_regularization"] = CounterBasedRegularizationDefinition()
    sharders = [tc.EmbeddingBagCollectionSharder(fused_params=counts)]
    with pytest.raises(ValueError, match="table 't_a': .* got weight_decay_mode=COUNTER"):
        models.planner(constraints).collective_plan(collection, sharders, dist.group.WORLD)
    with pytest.raises(ValueError, match="tables 't_a', 't_b', 't_c': .* nothing but momenta"):
        DistributedModelParallel(collection, plan=plan, sharders=sharders, device=CPU)


def test_plan_slots_and_bounds(tmp_path: Path):
    run_ranks(1, tmp_path, _plan_and_bounds)


def _go_on_after_a_failed_batch() -> list[float]:
    """What a pipeline trains when one batch has too many rows for the slots of a table."""
    model = sharded(tc.Lookahead(cache_fraction=0.01, min_slots=60), sharding_type="table_wise")
    data = list(models.batches(9, 8, SIZES))
    data[4] = next(models.batches(1, 600, SIZES))
    pipeline = tc.LookaheadTrainPipeline(model, dense_optimizer(model), CPU, depth=3)
    batches, trained = iter(data), []
    trained += [float(pipeline.progress(batches).sum()) for _ in range(4)]
    with pytest.raises(ScratchpadFullError, match="distinct rows, and the scratchpad has 60 slots"):
        pipeline.progress(batches)
    trained += [float(pipeline.progress(batches).sum()) for _ in range(4)]
    with pytest.raises(StopIteration):
        pipeline.progress(batches)
    pipeline.detach()
    trained.append(float(pipeline.progress(iter(data[:2])).sum()))  # attaches itself
    return trained


def test_a_pipeline_goes_on_after_a_failed_batch(tmp_path: Path):
    (trained,) = run_ranks(1, tmp_path, _go_on_after_a_failed_batch)
    assert len(trained) == 9
    assert all(map(math.isfinite, trained))


def _leave_a_broken_batch_out(depth: int) -> None:
    """What a pipeline trains is what it trains without the batch that it refuses."""
    trained = []
    for with_broken in (True, False):
        torch.manual_seed(0)
        model = sharded(KIND)
        data: list[Any] = list(models.batches(6, 8, SIZES))
        for place in (0, 4, 4) if with_broken else ():
            lengths = torch.full((8 * len(SIZES),), -1)
            keys = [name.replace("t_", "f_") for name in SIZES]
            data.insert(place, KeyedJaggedTensor(keys=keys, values=lengths, lengths=lengths))
        pipeline = tc.LookaheadTrainPipeline(model, dense_optimizer(model), CPU, depth=depth)
        batches, sums, refused = iter(data), [], []
        while True:
            try:
                sums.append(float(pipeline.progress(batches).sum()))
            except ValueError as error:
                refused.append(str(error))
            except StopIteration:
                break
        assert len(refused) == len(data) - 6
        assert all("lengths of bags must be >= 0, got -1" in reason for reason in refused)
        trained.append(sums)
    assert len(trained[0]) == 6
    assert trained[0] == trained[1]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_pipeline_leaves_a_broken_batch_out(tmp_path: Path, depth: int):
    run_ranks(1, tmp_path, _leave_a_broken_batch_out, depth)


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        tc.LookaheadTrainPipeline(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), CPU, depth=0)
