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

    state = SketchState.empty(shards=16, buckets=20, hot_rows=30)
    for batch in batches(4):
        ops.observe(state, *batch)
        ops.rebalance(state, torch.arange(16), num_medium=20)
    tables = torch.tensor([[3000, 16, 0, 0, 0], [9000, 9, 0, 16, -1], [3000, 32, 0, 25, 2]])

    def hot(device: str) -> ops.HotRows:
        return ops.HotRows(
            buckets=on(device, state).buckets,
            first_shard=0,
            num_shards=16,
            rows=ops.PoolRows(offset=57, hot_rows_per_shard=30, second_rows_per_shard=10),
        )

    ids = ids.clamp(min=0)
    expected = ops.remap(ids, offsets, tables, hot("cpu"))
    got = ops.remap(ids.cuda(), offsets.cuda(), tables.cuda(), hot("cuda"))
    for name in expected._fields:
        assert torch.equal(getattr(expected, name), getattr(got, name).cpu()), name


def test_learning_is_the_same_on_both():
    generator = torch.Generator().manual_seed(0)
    features = torch.tensor([1, -1, 0, 1])
    states = [SketchState.empty(shards=16, buckets=20, hot_rows=40)]
    states.append(on("cuda", states[0]))
    norms = [torch.zeros((16, 2, 2), dtype=torch.float64).to(device) for device in ("cpu", "cuda")]
    for number in range(6):
        grad = torch.randn((4 * 700, 24), generator=generator)
        grad[number] = float("nan")
        lengths = torch.randint(0, 4, (4 * 700,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        size = int(offsets[-1])
        keys = (torch.rand(size, generator=generator) ** 3 * 3000).long()
        shards = (keys % 17 - 1).int()
        weights = torch.randn(size, generator=generator) if number % 2 else None
        empty = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
        for state, sums in zip(states, norms, strict=True):
            device = sums.device
            told = keys.to(device), shards.to(device)
            batch = ops.Remapped(empty[0], empty[0], empty[1], *told, empty[1])
            ops.learn(
                state,
                sums,
                grad.to(device),
                offsets.to(device),
                batch,
                features=features.to(device),
                weights=None if weights is None else weights.to(device),
                decay=0.9,
                growth=4.0,
            )
        assert torch.equal(norms[0], norms[1].cpu())
        for name, tensor in on("cpu", states[1]).tensors().items():
            assert torch.equal(tensor, states[0].tensors()[name]), name


def test_rows_of_a_pool_are_the_same_on_both():
    tables = torch.tensor([[3000, 16, 0, 0, 0], [9000, 9, 0, 16, -1], [3000, 32, 0, 25, 1]])
    pool = ops.PoolRows(offset=57, hot_rows_per_shard=10, second_rows_per_shard=3)
    rows_of = {"cpu": torch.randn(57 + 16 * 13, 8), "cuda": torch.empty(0)}
    rows_of["cuda"] = rows_of["cpu"].cuda()
    states = {"cpu": SketchState.empty(shards=16, buckets=20, hot_rows=10)}
    states["cuda"] = on("cuda", states["cpu"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        lengths = torch.randint(0, 4, (3 * 200,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        skewed = torch.rand(int(lengths.sum()), generator=generator) ** 3
        ids, importance = (skewed * 3000).long(), torch.rand(len(skewed), generator=generator)
        found = {}
        for device, state in states.items():
            hot = ops.HotRows(
                buckets=state.buckets,
                first_shard=0,
                num_shards=16,
                rows=pool,
            )
            given = ids.to(device), offsets.to(device), tables.to(device)
            batch = ops.remap(*given, hot)
            two_rows = ops.add_second_rows(batch, pool)
            both = ops.quotient_remainder(*given)
            ops.observe(state, batch.keys, batch.shards, importance.to(device))
            selected = torch.arange(16, device=device)
            moves = ops.Moves(selected, *ops.rebalance(state, selected, num_medium=30))
            pooled = tables[[0, 2]].to(device)
            ops.move_rows(rows_of[device], moves, pooled, pool, second_factor=0.5)
            found[device] = [*two_rows, *both, *moves, rows_of[device]]
        for expected, got in zip(found["cpu"], found["cuda"], strict=True):
            assert torch.equal(expected, got.cpu())
    assert (states["cpu"].hot_rows == ops.MEDIUM).any()


@pytest.mark.parametrize("num_hashes", [1, 3])
def test_bloom_encodings_are_the_same_on_both(num_hashes):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (3 * 200,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, 900, (int(lengths.sum()),), generator=generator)
    tables = torch.tensor([[1000, 16, 0, 0, 0], [900, 16, 0, 0, 1], [2000, 16, 0, 0, 2]])
    bits = ops.BloomBits(first_shard=0, shards_held=16, per_shard=20, num_hashes=num_hashes)
    batch = ids, offsets, tables
    on_gpu = tuple(tensor.cuda() for tensor in batch)
    for expected, got in zip(
        ops.bloom_rows(*batch, bits), ops.bloom_rows(*on_gpu, bits), strict=True
    ):
        assert torch.equal(expected, got.cpu())
    for of in ("rows", "weights"):
        expected, got = (ops.bloom_union(*given, bits, of=of) for given in (batch, on_gpu))
        assert torch.equal(expected.bits, got.bits.cpu())
        assert torch.equal(expected.offsets, got.offsets.cpu())
    weights = torch.randn((16, 20), generator=generator)
    factors = ops.bloom_weigh(weights, *batch, bits)
    assert torch.equal(factors, ops.bloom_weigh(weights.cuda(), *on_gpu, bits).cpu())
    token_rows = torch.randn((16 * 20, 12), generator=generator)
    options = {"row_bits": bits, "weight_bits": bits}
    pooled = ops.bloom_pool(token_rows, weights, *batch, **options)
    on_gpu_too = ops.bloom_pool(token_rows.cuda(), weights.cuda(), *on_gpu, **options)
    torch.testing.assert_close(on_gpu_too.cpu(), pooled)
    grad = torch.randn((600, 12), generator=generator)
    rows, grads = ops.bloom_weigh_backward(grad, token_rows, *batch, **options)
    rows_gpu, grads_gpu = ops.bloom_weigh_backward(
        grad.cuda(), token_rows.cuda(), *on_gpu, **options
    )
    added = torch.zeros(16 * 20 // 4, 4).index_add_(0, rows_gpu.cpu(), grads_gpu.cpu())
    expected = torch.zeros(16 * 20 // 4, 4)
    expected[rows] = grads
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)


def test_factors_of_keys_are_the_same_on_both():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 500, (3000,), generator=generator)
    shards = (keys % 17).int() - 1
    weights = torch.randn((16, 20), generator=generator)
    factors = ops.key_factors(weights, keys, shards, num_hashes=3)
    on_gpu = ops.key_factors(weights.cuda(), keys.cuda(), shards.cuda(), num_hashes=3)
    assert torch.equal(factors, on_gpu.cpu())
    grad = torch.randn(3000, generator=generator)
    options = {"shape": (16, 20), "num_hashes": 3}
    rows, grads = ops.key_factors_backward(grad, keys, shards, **options)
    given = ops.key_factors_backward(grad.cuda(), keys.cuda(), shards.cuda(), **options)
    summed = torch.zeros((81, 4)).index_add_(0, given[0].cpu(), given[1].cpu())
    torch.testing.assert_close(summed, torch.zeros((81, 4)).index_add_(0, rows, grads))
    bags = torch.randint(0, 4, (1000,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), bags.cumsum(0)])
    found = ops.Lookups(
        torch.randint(0, 50, (int(offsets[-1]),), generator=generator),
        offsets,
        torch.arange(int(offsets[-1]), dtype=torch.int32),
    )
    for table in (torch.randn(50, 12), torch.randn(50, 12).half()):
        pull = torch.randn(1000, 12)
        dots = ops.row_dots(pull, table, found, num_ids=len(found.rows))
        moved = ops.Lookups(*(tensor.cuda() for tensor in found))
        on_gpu = ops.row_dots(pull.cuda(), table.cuda(), moved, num_ids=len(found.rows))
        torch.testing.assert_close(dots, on_gpu.cpu(), rtol=1e-4, atol=1e-4)
