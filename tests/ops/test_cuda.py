"""CPU and CUDA kernels give the same state and the same results, bit for bit where documented.

On a GPU where there is one; and everywhere on the CPU, as fibers under several schedules, see
``docs/cuda.md``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.simt.device import SCHEDULES, Device, Gpu, simulated
from torchrec_cafe import ops
from torchrec_cafe.ops import SketchState

# The first test waits for a compiler.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.cuda), *SCHEDULES])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "gpu":
        return Gpu()
    device = simulated()
    device.set_schedule(request.param)
    return device


def put(device: Device, state: SketchState) -> SketchState:
    return SketchState(**{name: device.put(tensor) for name, tensor in state.tensors().items()})


def assert_same(expected: SketchState, got: SketchState) -> None:
    for name, tensor in got.tensors().items():
        assert torch.equal(tensor.cpu(), expected.tensors()[name]), name


def draw(size: int, seed: int, *, hot: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, shards and importance; hot: all but a few are one key."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(size, generator=generator) ** 3 * 3000).long()
    tables = torch.randint(0, 3, (size,), generator=generator)
    if hot:
        ids[torch.rand(size, generator=generator) < 0.95] = 17
        tables[ids == 17] = 1
    importance = torch.rand(size, generator=generator)
    importance[::97] = float("nan")
    return tables << 48 | ids, (ids % 17 - 1).int(), importance


def bags(count: int, most: int, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(0, most, (count,), generator=generator)
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


@pytest.mark.parametrize("hot", [False, True])
def test_sketch_is_the_same_on_both(device: Device, hot):
    cpu = SketchState.empty(shards=16, buckets=20, hot_rows=40)
    gpu = put(device, cpu)
    for number in range(3):
        batch = draw(device.size, number, hot=hot)
        selected = torch.arange(number % 4, 16, 8)
        ops.observe(cpu, *batch, growth=2.0**30)
        device.run(ops.observe, gpu, *map(device.put, batch), growth=2.0**30)
        assert_same(cpu, gpu)
        options = {"hysteresis": 0.1, "num_medium": 10}
        left = ops.rebalance(cpu, selected, **options)
        right = device.run(ops.rebalance, gpu, device.put(selected), **options)
        for expected, got in zip(left, right, strict=True):
            assert torch.equal(expected, got.cpu())
        assert_same(cpu, gpu)


def test_a_sketch_of_one_bucket_is_the_same_on_both(device: Device):
    """All occurrences meet in one bucket, and more keys want a row than there are."""
    cpu = SketchState.empty(shards=1, buckets=1, hot_rows=2)
    gpu = put(device, cpu)
    keys, _, importance = draw(100, 0, hot=False)
    shards = torch.zeros(100, dtype=torch.int32)
    for growth in (1.0, 8.0):
        ops.observe(cpu, keys % 7, shards, importance, growth=growth)
        batch = device.put(keys % 7), device.put(shards), device.put(importance)
        device.run(ops.observe, gpu, *batch, growth=growth)
        ops.rebalance(cpu, torch.zeros(1, dtype=torch.int64))
        device.run(ops.rebalance, gpu, device.put(torch.zeros(1, dtype=torch.int64)))
        assert_same(cpu, gpu)
    assert (cpu.hot_rows >= 0).sum() == 2


def test_shards_out_of_order_are_left_alone(device: Device):
    """Each is rebalanced once: two blocks on one shard would give a row to two keys."""
    cpu = SketchState.empty(shards=6, buckets=4, hot_rows=3)
    keys, _, importance = draw(300, 0, hot=False)
    ops.observe(cpu, keys, (keys % 6).int(), importance)
    gpu = put(device, cpu)
    ops.rebalance(cpu, torch.tensor([1, 5]))
    selected = device.put(torch.tensor([1, 1, 5, 3, 5, 6, -1]))
    actions, _ = device.run(ops.rebalance, gpu, selected)
    assert_same(cpu, gpu)
    assert actions.cpu().any(1).tolist() == [True, False, True, False, False, False, False]


@pytest.mark.parametrize("features", [1, 3])
def test_mixing_is_the_same_on_both(device: Device, features):
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(features + 1) * device.size // features
    sizes = torch.tensor([3000, 0, 1])[:features]
    ids = torch.randint(-5000, 3000, (device.size,), generator=generator)
    counts = torch.zeros(features, dtype=torch.int64)
    counts_gpu = device.put(counts)
    mixed = ops.mix_ids(ids, offsets, sizes, counts)
    given = device.put(ids), device.put(offsets), device.put(sizes)
    assert torch.equal(mixed, device.run(ops.mix_ids, *given, counts_gpu).cpu())
    assert torch.equal(counts, counts_gpu.cpu())
    assert counts[0] > 0.5 * device.size / features  # all add to one number


def test_learning_is_the_same_on_both(device: Device):
    generator = torch.Generator().manual_seed(0)
    features = torch.tensor([1, -1, 0, 1])
    samples = device.size // 4
    cpu = SketchState.empty(shards=16, buckets=20, hot_rows=40)
    gpu = put(device, cpu)
    norms = torch.zeros((16, 2, 2), dtype=torch.float64)
    norms_gpu = device.put(norms)
    for number in range(3):
        grad = torch.randn((4 * samples, 12), generator=generator)
        grad[number] = float("nan")
        offsets = bags(4 * samples, 4, generator)
        keys, shards, weights = draw(int(offsets[-1]), number, hot=number == 2)
        empty = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
        batch = ops.Remapped(empty[0], empty[0], empty[1], keys, shards, empty[1], empty[1])
        told = {"weights": weights if number % 2 else None, "features": features}
        options = {"decay": 0.9, "growth": 4.0}
        given = norms, grad, offsets, batch
        given_gpu = (
            *(norms_gpu, device.put(grad), device.put(offsets)),
            ops.Remapped(*map(device.put, batch)),
        )
        told_gpu = {name: None if x is None else device.put(x) for name, x in told.items()}
        if number:
            ops.learn(cpu, *given, **told, **options)
            device.run(ops.learn, gpu, *given_gpu, **told_gpu, **options)
        else:
            _learn_scaled(
                device, (cpu, *given), (gpu, *given_gpu), told | options, told_gpu | options
            )
        assert torch.equal(norms, norms_gpu.cpu())
        assert_same(cpu, gpu)


def _learn_scaled(
    device: Device,
    given: tuple[Any, ...],
    given_gpu: tuple[Any, ...],
    options: dict[str, Any],
    options_gpu: dict[str, Any],
) -> None:
    """On both; the gradients of the weights are the same but for the order of additions."""
    _, _, grad, _, batch = given
    num_bags, num_ids = len(grad), len(batch.keys)
    generator = torch.Generator().manual_seed(0)
    offsets = bags(num_bags, 3, generator)
    count = int(offsets[-1])
    found = ops.Lookups(
        torch.randint(0, 50, (count,), generator=generator),
        offsets,
        torch.randint(0, num_ids, (count,), generator=generator, dtype=torch.int32),
    )
    table = torch.randn((50, grad.shape[1]), generator=generator)
    taught = torch.where(torch.arange(num_ids) % 3 > 0, batch.shards, -1)
    scaled = ops.ScaledRows(table, found, taught, 32, 3)
    scaled_gpu = ops.ScaledRows(
        device.put(table), ops.Lookups(*map(device.put, found)), device.put(taught), 32, 3
    )
    expected = ops.learn_scaled(*given, scaled, **options)
    got = device.run(ops.learn_scaled, *given_gpu, scaled_gpu, **options_gpu)
    sums = [
        torch.zeros((33, 16)).index_add_(0, rows.cpu(), grads.cpu())
        for rows, grads in (expected, got)
    ]
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_rows_of_a_pool_are_the_same_on_both(device: Device):
    tables = torch.tensor([[3000, 16, 0, 0, 0], [9000, 9, 0, 16, -1], [3000, 32, 0, 25, 1]])
    pool = ops.PoolRows(offset=57, hot_rows_per_shard=10, second_rows_per_shard=3)
    generator = torch.Generator().manual_seed(0)
    cpu = SketchState.empty(shards=16, buckets=20, hot_rows=10)
    gpu = put(device, cpu)
    rows = torch.randn(57 + 16 * 13, 40, generator=generator)
    rows_gpu = device.put(rows)
    for number in range(3):
        offsets = bags(device.size // 6 * 3, 4, generator)
        skewed = torch.rand(int(offsets[-1]), generator=generator) ** 3
        given = (skewed * 3000).long(), offsets, tables
        importance = torch.rand(len(skewed), generator=generator)
        selected = torch.arange(number, 16, 6)

        def step(state: SketchState, rows: Tensor, *given: Tensor) -> list[Tensor]:
            *batch, importance, selected, pooled = given
            hot = ops.HotRows(buckets=state.buckets, first_shard=0, num_shards=16, rows=pool)
            remapped = ops.remap(*batch, hot)
            two_rows = ops.add_second_rows(remapped, pool)
            ops.observe(state, remapped.keys, remapped.shards, importance)
            moves = ops.Moves(selected, *ops.rebalance(state, selected, num_medium=30))
            ops.move_rows(rows, moves, pooled, pool, second_factor=0.5)
            return [*remapped, *two_rows, *ops.quotient_remainder(*batch), *moves, rows]

        given = *given, importance, selected, tables[[0, 2]]
        expected = step(cpu, rows, *given)
        found = device.run(step, gpu, rows_gpu, *map(device.put, given))
        for left, right in zip(expected, found, strict=True):
            assert torch.equal(left, right.cpu())
        assert_same(cpu, gpu)
    assert (cpu.hot_rows == ops.MEDIUM).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_less_precision_move_the_same_on_both(device: Device, dtype):
    pool = ops.PoolRows(offset=20, hot_rows_per_shard=4, second_rows_per_shard=2)
    rows = torch.randn(20 + 2 * 6, 6).to(dtype)
    rows_gpu = device.put(rows)
    actions = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 2]], dtype=torch.int8)
    moves = ops.Moves(torch.tensor([0, 1]), actions, torch.arange(8).view(2, 4))
    tables = torch.tensor([[100, 20, 0, 0, 0]])
    ops.move_rows(rows, moves, tables, pool, second_factor=0.5)
    moves = ops.Moves(*map(device.put, moves))
    device.run(ops.move_rows, rows_gpu, moves, device.put(tables), pool, second_factor=0.5)
    assert torch.equal(rows, rows_gpu.cpu())


@given(
    lengths=st.lists(st.integers(0, 5), min_size=3, max_size=24),
    num_hashes=st.integers(1, 16),
    dim=st.integers(1, 140),
    half=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=6, deadline=None)
def check_bloom(lengths, num_hashes, dim, half, weighted, seed, *, device: Device):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths[: len(lengths) // 3 * 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, 900, (int(offsets[-1]),), generator=generator)
    tables = torch.tensor([[1000, 16, 0, 0, 0], [900, 16, 0, 0, 1], [2000, 16, 0, 0, 2]])
    bits = ops.BloomBits(first_shard=0, shards_held=16, per_shard=20, num_hashes=num_hashes)
    batch = ids, offsets, tables
    moved = tuple(map(device.put, batch))
    expected, got = ops.bloom_rows(*batch, bits), device.run(ops.bloom_rows, *moved, bits)
    for left, right in zip(expected, got, strict=True):
        assert torch.equal(left, right.cpu())
    for of in ("rows", "weights"):
        expected = ops.bloom_union(*batch, bits, of=of)
        got = device.run(ops.bloom_union, *moved, bits, of=of)
        assert torch.equal(expected.bits, got.bits.cpu())
        assert torch.equal(expected.offsets, got.offsets.cpu())
    weights = torch.randn((16, 20), generator=generator)
    weights_gpu = device.put(weights)
    factors = ops.bloom_weigh(weights, *batch, bits)
    assert torch.equal(factors, device.run(ops.bloom_weigh, weights_gpu, *moved, bits).cpu())
    rows = torch.randn((16 * 20, dim), generator=generator)
    rows = rows.half() if half else rows
    options = {"row_bits": bits, "weight_bits": bits}
    samples = torch.rand(len(ids), generator=generator) if weighted else None
    both = (
        {"per_sample_weights": samples},
        {"per_sample_weights": None if samples is None else device.put(samples)},
    )
    pooled = ops.bloom_pool(rows, weights, *batch, **options, **both[0])
    moved_rows = device.put(rows)
    got = device.run(ops.bloom_pool, moved_rows, weights_gpu, *moved, **options, **both[1])
    torch.testing.assert_close(got.cpu(), pooled, rtol=1e-4, atol=1e-4)
    grad = torch.randn((len(lengths), dim), generator=generator)
    given = grad, rows, *batch
    rows_of, grads = ops.bloom_weigh_backward(*given, **options, **both[0])
    given = device.put(grad), moved_rows, *moved
    rows_gpu, grads_gpu = device.run(ops.bloom_weigh_backward, *given, **options, **both[1])
    expected = torch.zeros((81, 4)).index_add_(0, rows_of, grads)
    added = torch.zeros((81, 4)).index_add_(0, rows_gpu.cpu(), grads_gpu.cpu())
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)


def test_bloom_encodings_are_the_same_on_both(device: Device):
    check_bloom(device=device)


def test_factors_of_keys_are_the_same_on_both(device: Device):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 500, (device.size,), generator=generator)
    shards = (keys % 17).int() - 1
    weights = torch.randn((16, 32), generator=generator)
    source = torch.randint(0, len(keys), (device.size + 7,), generator=generator).int()
    for of in (None, source):
        factors = ops.key_factors(weights, keys, shards, of, num_hashes=3)
        given = [device.put(t) for t in (weights, keys, shards)]
        moved = None if of is None else device.put(of)
        got = device.run(ops.key_factors, *given, moved, num_hashes=3)
        assert torch.equal(factors, got.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_factors_are_the_same_on_both(device: Device, dtype):
    generator = torch.Generator().manual_seed(0)
    offsets = bags(device.size // 20, 4, generator)
    offsets = offsets[: len(offsets) // 4 * 4 + 1]
    count = int(offsets[-1])
    source = torch.randint(0, 900, (count,), generator=generator).int()
    found = ops.Lookups(torch.randint(0, 50, (count,), generator=generator), offsets, source)
    keys = torch.randint(0, 500, (900,), generator=generator)
    shards = (keys % 17).int() - 1
    table = torch.randn((50, 44), generator=generator).to(dtype)
    grad = torch.randn((len(offsets) - 1, 44), generator=generator)
    options = {"shape": (16, 32), "num_hashes": 3}
    arguments = grad, table, found, keys, shards
    moved = [
        device.put(t) if isinstance(t, Tensor) else ops.Lookups(*map(device.put, t))
        for t in arguments
    ]
    for features in (torch.zeros(1, dtype=torch.int64), torch.tensor([0, -1, -1, 1])):
        for besides in (None, torch.rand(900, generator=generator)):
            of_both = {"features": features, "given": besides}
            rows, grads = ops.factor_gradients(*arguments, **of_both, **options)
            put = {k: None if t is None else device.put(t) for k, t in of_both.items()}
            got = device.run(ops.factor_gradients, *moved, **put, **options)
            summed = torch.zeros((33, 16)).index_add_(0, got[0].cpu(), got[1].cpu())
            expected = torch.zeros((33, 16)).index_add_(0, rows, grads)
            torch.testing.assert_close(summed, expected, rtol=1e-4, atol=1e-3)


def test_nothing_comes_of_nothing(device: Device):
    """Empty batches launch no kernel of no block, and change nothing."""
    tables = device.put(torch.tensor([[3000, 16, 0, 0, 0]]))
    state = put(device, SketchState.empty(shards=16, buckets=20, hot_rows=4))
    before = put(device, state)
    ids = device.put(torch.empty(0, dtype=torch.int64))
    floats = device.put(torch.empty(0))
    pool = ops.PoolRows(offset=16, hot_rows_per_shard=4, second_rows_per_shard=1)
    hot = ops.HotRows(buckets=state.buckets, first_shard=0, num_shards=16, rows=pool)
    bits = ops.BloomBits(first_shard=0, shards_held=16, per_shard=20, num_hashes=2)
    for offsets in (torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
        batch = ids, device.put(offsets), tables
        remapped = device.run(ops.remap, *batch, hot)
        assert len(remapped.rows) == 0
        assert len(device.run(ops.add_second_rows, remapped, pool).rows) == 0
        assert len(device.run(ops.quotient_remainder, *batch).rows) == 0
        assert len(device.run(ops.bloom_rows, *batch, bits).rows) == 0
        assert len(device.run(ops.bloom_union, *batch, bits, of="rows").bits) == 0
        device.run(ops.observe, state, remapped.keys, remapped.shards, floats)
    none = device.put(torch.empty(0, dtype=torch.int64))
    actions, _ = device.run(ops.rebalance, state, none)
    assert actions.shape == (0, 4)
    assert state.steps.tolist() == [2] * 16
    state.steps.zero_()
    assert_same(put(device, before), state)
