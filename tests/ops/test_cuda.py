"""CPU and CUDA give the same state and the same results, bit for bit."""

from __future__ import annotations

import pytest
import torch

from torchrec_cafe import ops
from torchrec_cafe.ops import SketchState

pytestmark = pytest.mark.cuda


def on(device: str, state: SketchState) -> SketchState:
    return SketchState(**{name: tensor.to(device) for name, tensor in state.tensors().items()})


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        ids = (torch.rand(5000, generator=generator) ** 3 * 3000).long()
        tables = torch.randint(0, 3, (5000,), generator=generator)
        shards = (ids % 17 - 1).int()
        importance = torch.rand(5000, generator=generator)
        importance[::97] = float("nan")
        result.append((tables << 48 | ids, shards, importance))
    return result


def test_sketch_is_the_same_on_both():
    cpu = SketchState.empty(shards=16, buckets=20, hot_rows=40)
    gpu = on("cuda", cpu)
    for number, batch in enumerate(batches(20)):
        selected = torch.arange(number % 4, 16, 4)
        ops.observe(cpu, *batch, growth=8.0)
        ops.observe(gpu, *(t.cuda() for t in batch), growth=8.0)
        left = ops.rebalance(cpu, selected, hysteresis=0.1)
        right = ops.rebalance(gpu, selected.cuda(), hysteresis=0.1)
        for expected, got in zip(left, right, strict=True):
            assert torch.equal(expected, got.cpu())
        for name, tensor in on("cpu", gpu).tensors().items():
            assert torch.equal(tensor, cpu.tensors()[name]), name


def test_mixing_and_remapping_are_the_same_on_both():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (3 * 200,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(-5, 3000, (int(lengths.sum()),), generator=generator)
    sizes, feature_offsets = torch.tensor([3000, 0, 2900]), offsets[::200].contiguous()
    counts = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64).cuda()
    mixed = ops.mix_ids(ids, feature_offsets, sizes, counts[0])
    mixed_gpu = ops.mix_ids(ids.cuda(), feature_offsets.cuda(), sizes.cuda(), counts[1])
    assert torch.equal(mixed, mixed_gpu.cpu())
    assert torch.equal(counts[0], counts[1].cpu())

    state = SketchState.empty(shards=16, buckets=20, hot_rows=40)
    for batch in batches(4):
        ops.observe(state, *batch)
        ops.rebalance(state, torch.arange(16))
    tables = torch.tensor([[3000, 16, 0, 0, 0], [9000, 9, 0, 16, -1], [3000, 32, 0, 25, 2]])

    def hot(device: str) -> ops.HotRows:
        return ops.HotRows(
            buckets=on(device, state).buckets,
            first_shard=0,
            num_shards=16,
            rows_per_shard=40,
            offset=57,
        )

    ids = ids.clamp(min=0)
    expected = ops.remap(ids, offsets, tables, hot("cpu"))
    got = ops.remap(ids.cuda(), offsets.cuda(), tables.cuda(), hot("cuda"))
    for name in expected._fields:
        assert torch.equal(getattr(expected, name), getattr(got, name).cpu()), name
