"""What we rely on of FBGEMM without its promise still exists and means what we think."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    GlobalWeightDecayDefinition,
    WeightDecayMode,
)

from torchrec_cafe.tables import SlotTBE
from torchrec_cafe.tables._fbgemm import RowRangeTBE, cpu_update


def slots(**fused_params: Any) -> SlotTBE:
    return SlotTBE(
        10,
        8,
        weights_precision=SparseType.FP32,
        device=torch.device("cpu"),
        fused_params={"learning_rate": 1.0, **fused_params},
    )


def test_counters_of_rows_are_noticed():
    assert not slots(optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD).counts_by_row
    rowwise: dict[str, Any] = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay": 0.1}
    counters = CounterBasedRegularizationDefinition()
    mode = WeightDecayMode.COUNTER
    tbe = slots(weight_decay_mode=mode, counter_based_regularization=counters, **rowwise)
    assert tbe.counts_by_row
    steps = {"global_weight_decay": GlobalWeightDecayDefinition()}
    tbe = slots(weight_decay_mode=WeightDecayMode.DECOUPLE_GLOBAL, **steps, **rowwise)
    assert tbe.counts_by_row


@pytest.mark.parametrize(
    "optimizer",
    [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD],
)
def test_updates_that_do_not_count_lookups(optimizer: EmbOptimType):
    tbe = slots(optimizer=optimizer)
    assert not tbe.counts_lookups
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
    weights = []
    for idle in (0, 5):
        tbe = slots(optimizer=optimizer)
        for _ in range(idle):
            tbe.pool(ids, offsets, None)
        tbe.pool(ids, offsets, None).sum().backward()
        weights.append(tbe.physical_tensors()[0])
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "optimizer",
    [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD],
)
@pytest.mark.parametrize("options", [{}, {"gradient_clipping": True, "max_gradient": 0.5}])
def test_an_update_is_that_of_a_backward_pass(optimizer: EmbOptimType, options: dict[str, Any]):
    assert cpu_update(optimizer) is not None, "FBGEMM's operator has other arguments now"
    generator = torch.Generator().manual_seed(0)
    ours, fbgemm = (row_ranges(optimizer=optimizer, **options) for _ in range(2))
    for learning_rate in (1.0, 0.25):
        rows = torch.randint(0, 50, (40,), generator=generator)
        grads = torch.randn((40, 8), generator=generator)
        for tbe in (ours, fbgemm):
            tbe.set_learning_rate(learning_rate)
        ours.update(rows, grads.clone())
        fbgemm.pool(rows, torch.arange(41), None).backward(grads)
        for tensor, expected in zip(
            ours.physical_tensors(), fbgemm.physical_tensors(), strict=True
        ):
            assert torch.equal(tensor, expected)


def test_a_learning_rate_that_is_shared_is_set_for_both():
    rows, grads = torch.tensor([3]), torch.ones(1, 8)
    leader, follower, alone = (row_ranges(optimizer=EmbOptimType.EXACT_SGD) for _ in range(3))
    follower.update(rows, grads)
    follower.share_learning_rate(leader)
    leader.set_learning_rate(0.125)
    assert follower.get_learning_rate() == 0.125
    assert alone.get_learning_rate() != 0.125
    before = follower.physical_tensors()[0].clone()
    follower.update(rows, grads)
    assert torch.equal(before - follower.physical_tensors()[0], _only(3, 0.125, before))


def _only(row: int, value: float, like: torch.Tensor) -> torch.Tensor:
    expected = torch.zeros_like(like)
    expected[row] = value
    return expected


def test_an_update_takes_options_and_memory_that_have_changed():
    optimizer = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    ours, fbgemm = (row_ranges(optimizer=optimizer) for _ in range(2))
    rows, grads = torch.tensor([3, 4]), torch.ones(2, 8)
    for eps in (1e-8, 0.5):
        for tbe in (ours, fbgemm):
            tbe.update_hyper_parameters({"eps": eps})
            weights: Any = tbe.weights_host
            weights.data = weights.data.clone()
        ours.update(rows, grads)
        fbgemm.pool(rows, torch.arange(3), None).backward(grads)
        table = ours.physical_tensors()[0]
        assert table.data_ptr() == ours.weights_host.data_ptr()
        assert torch.equal(table, fbgemm.physical_tensors()[0])


def test_an_update_of_an_optimizer_that_counts_lookups_looks_up():
    options: dict[str, Any] = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "weight_decay": 0.1,
        "weight_decay_mode": WeightDecayMode.COUNTER,
        "counter_based_regularization": CounterBasedRegularizationDefinition(),
    }
    ours, fbgemm = (row_ranges(**options) for _ in range(2))
    rows, grads = torch.tensor([3, 4, 3]), torch.ones(3, 8)
    ours.update(rows, grads)
    fbgemm.pool(rows, torch.arange(4), None).backward(grads)
    assert torch.equal(ours.physical_tensors()[0], fbgemm.physical_tensors()[0])


def row_ranges(**fused_params: Any) -> RowRangeTBE:
    tbe = RowRangeTBE(
        [50],
        8,
        weights_precision=SparseType.FP32,
        device=torch.device("cpu"),
        fused_params={"learning_rate": 1.0, **fused_params},
    )
    tbe.physical_tensors()[0].fill_(1.0)
    return tbe


def test_hooks_run_right_before_and_after_the_update():
    tbe = slots(optimizer=EmbOptimType.EXACT_SGD)
    pooled = tbe.pool(torch.tensor([1]), torch.tensor([0, 1]), None)
    seen = []
    node: Any = pooled.grad_fn
    node.register_prehook(lambda _: seen.append(tbe.physical_tensors()[0][1].clone()))
    node.register_hook(lambda *_: seen.append(tbe.physical_tensors()[0][1].clone()))
    pooled.sum().backward()
    assert seen[0].eq(0).all()
    assert seen[1].eq(-1).all()


def test_indices_that_change_before_the_update_move_it():
    tbe = slots(optimizer=EmbOptimType.EXACT_SGD)
    ids = torch.tensor([1])
    pooled = tbe.pool(ids, torch.tensor([0, 1]), None)
    ids.data.copy_(torch.tensor([4]))
    pooled.sum().backward()
    assert tbe.physical_tensors()[0][4].eq(-1).all()
    assert tbe.physical_tensors()[0][1].eq(0).all()


@pytest.mark.cuda
def test_the_same_on_a_gpu():
    device = torch.device("cuda", 0)
    options: dict[str, Any] = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 1.0}
    tbe = SlotTBE(10, 8, weights_precision=SparseType.FP32, device=device, fused_params=options)
    tbe.physical_tensors()[0].zero_()
    ids = torch.tensor([1], device=device)
    pooled = tbe.pool(ids, torch.tensor([0, 1], device=device), None)
    streams, stream = [], torch.cuda.current_stream(device)
    node: Any = pooled.grad_fn
    node.register_prehook(lambda _: streams.append(torch.cuda.current_stream(device)))
    node.register_hook(lambda *_: streams.append(torch.cuda.current_stream(device)))
    ids.data.copy_(torch.tensor([4]))
    pooled.sum().backward()
    assert streams == [stream, stream]
    assert tbe.physical_tensors()[0][4].eq(-1).all()
    assert tbe.physical_tensors()[0][1].eq(0).all()
