"""Look-ahead tables on a GPU against FBGEMM's own there: equal to the last bit.

FBGEMM adds up the gradients of a row in an order of its own choice only where a row occurs more
than 1024 times in a batch; no batch here has so many.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from tests.tables.test_lookahead import (
    OPTIMIZERS,
    TABLES,
    Batch,
    BrokenStore,
    Pair,
    SlowStore,
    bags_of,
    distinct,
    trace,
    window,
)
from torchrec_cafe.tables import ScratchpadFullError, on_device
from torchrec_cafe.tables.device_streams import CudaDevice, Device, Mark, Stream
from torchrec_cafe.tables.slot_memory import DeviceSlots

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
ALL_OPTIMIZERS = (*OPTIMIZERS, EmbOptimType.ADAM)
#: cycles of a GPU's clock
SLEEPS = (0, 0, 10_000, 1_000_000)


def on_gpu(batches: Sequence[Batch]) -> list[Batch]:
    return [(ids.to(CUDA), offsets.to(CUDA)) for ids, offsets in batches]


class DelayedStream(Stream):
    """A stream that takes its time, never the same."""

    def __init__(self, device: Device, stream: Stream, seed: int) -> None:
        self._device = device
        self._stream = stream
        self._random = random.Random(seed)

    def _sleep(self) -> None:
        inner: Any = self._stream
        with torch.cuda.stream(inner._stream):
            torch.cuda._sleep(self._random.choice(SLEEPS))

    def mark(self) -> Mark:
        return self._stream.mark()

    def wait_for(self, mark: Mark) -> None:
        self._stream.wait_for(mark)

    def keep(self, tensor: Tensor) -> None:
        self._stream.keep(tensor)

    def to_device(self, host: Tensor) -> Tensor:
        self._sleep()
        return self._stream.to_device(host)

    def to_host(self, tensor: Tensor, into: Tensor) -> None:
        self._sleep()
        self._stream.to_host(tensor, into)

    def take_rows(self, source: Tensor, rows: Tensor) -> Tensor:
        self._sleep()
        return self._stream.take_rows(source, rows)

    def put_rows(self, into: Tensor, rows: Tensor, values: Tensor) -> None:
        self._sleep()
        self._stream.put_rows(into, rows, values)


class DelayedDevice(Device):
    """A GPU whose copies take their time."""

    def __init__(self) -> None:
        self._device = CudaDevice(CUDA)

    def current(self) -> Stream:
        return self._device.current()

    def stream(self) -> Stream:
        return DelayedStream(self, self._device.stream(), 0)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._device.pinned(shape, dtype)

    def settle(self) -> None:
        self._device.settle()


@pytest.mark.parametrize("optimizer", ALL_OPTIMIZERS)
@pytest.mark.parametrize("depth", range(5))
def test_100_steps_are_those_of_whole_tables(optimizer, depth):
    for kind in ("zipf", "new"):
        batches = trace(kind, 100)
        pair = Pair(window(batches, depth), optimizer, device=CUDA)
        pair.run(on_gpu(batches), depth)
        assert (pair.bags.statistics.critical_misses == 0) == (depth > 0)


@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_dtypes_pooling_and_weights(precision, pooling):
    batches = trace("zipf", 20)
    pair = Pair(window(batches, 2), precision=precision, pooling=pooling, device=CUDA)
    pair.run(on_gpu(batches), 2)
    weighted = Pair(window(batches, 0), precision=precision, device=CUDA)
    for batch in on_gpu(batches):
        weighted.step(batch, torch.linspace(-1, 2, len(batch[0]), device=CUDA))
    weighted.compare()


@pytest.mark.parametrize("staging_bytes", [1, 1000, 1 << 25])
@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ADAGRAD, EmbOptimType.ADAM])
def test_late_copies_and_late_training_change_nothing(staging_bytes, optimizer, monkeypatch):
    monkeypatch.setattr(
        "torchrec_cafe.tables.lookahead.slot_memory",
        lambda tensors: DeviceSlots(tensors, DelayedDevice(), staging_bytes),
    )
    random_ = random.Random(0)
    batches = trace("new", 40)
    pair = Pair(window(batches, 3), optimizer, store=SlowStore, device=CUDA)
    side = torch.cuda.Stream(CUDA)
    moved = on_gpu(batches)
    for number, batch in enumerate(moved):
        side.wait_stream(torch.cuda.current_stream(CUDA))
        with torch.cuda.stream(side):  # as a pipeline's prefetch stream
            for coming in moved[number : number + 4]:
                pair.bags.look_ahead(*coming)
        torch.cuda._sleep(random_.choice(SLEEPS))
        pair.step(batch)
        torch.cuda._sleep(random_.choice(SLEEPS))
        if number % 11 == 10:
            pair.compare()
    pair.compare()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_with_more_rows_than_slots_is_looked_up_table_by_table(optimizer):
    batches = trace("random", 60)
    pair = Pair(window(batches, 0) * 2 // 3, optimizer, device=CUDA)
    pair.run(on_gpu(batches), 2)
    assert pair.bags.statistics.critical_misses > 0


def test_adam_refuses_a_batch_with_more_rows_than_slots_and_goes_on():
    batches = trace("zipf", 8)
    large = bags_of(torch.full((TABLES * 16,), 9), torch.arange(9 * TABLES * 16) % 400)
    pair = Pair(window(batches, 1), EmbOptimType.ADAM, device=CUDA)
    assert distinct([large]) > pair.tbe_slots
    pair.run(on_gpu(batches[:4]), 1)
    with pytest.raises(ScratchpadFullError, match="cache_fraction"):
        pair.bags(*on_gpu([large])[0])
    pair.run(on_gpu(batches[4:]), 1)


def test_refused_batches_and_a_broken_store():
    batches = on_gpu(trace("new", 6))
    pair = Pair(window(trace("new", 6), 1), store=BrokenStore, device=CUDA)
    pair.run(batches[:3], 1)
    negative = batches[3][0], -batches[3][1]  # offsets that descend
    with pytest.raises(ValueError, match="offsets"):
        pair.bags(*negative)
    pair.run(batches[:3], 1)
    pair.store.fails = True
    with pytest.raises(OSError, match="the disk is gone"):
        pair.bags(*batches[4])


def test_what_the_outside_does_to_the_state_is_seen():
    batches = trace("same", 12)
    pair = Pair(window(batches, 3), device=CUDA)
    moved = on_gpu(batches)
    pair.run(moved[:5], 3)
    for coming in moved[5:8]:
        pair.bags.look_ahead(*coming)
    ours, theirs = pair.bags(*moved[5]), pair.whole(*moved[5])
    pair.compare()  # flushes between forward and backward
    stream = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(stream):  # nobody is told that it waits
        torch.cuda._sleep(SLEEPS[-1])
        for weights in pair.tbe.split_embedding_weights():
            weights.mul_(0.5)
    for weights in pair.whole.split_embedding_weights():
        weights.mul_(0.5)
    ours.sum().backward()
    theirs.sum().backward()
    pair.run(moved[6:], 3)


def test_the_training_waits_for_nothing():
    batches = trace("new", 30)
    pair = Pair(window(batches, 4), device=CUDA)
    moved = on_gpu(batches)
    pair.run(moved[:5], 4)  # FBGEMM reads its counter of steps once
    pair.bags.look_ahead(*moved[5])
    pair.bags(*moved[5]).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(6, 30):
            for coming in moved[number : number + 5]:
                pair.bags.look_ahead(*coming)
            pair.bags(*moved[number]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_host_memory_is_the_same_on_both_sides():
    for tensor in (torch.randn(1000, 8), torch.arange(7.0).half(), torch.empty(0, 4)):
        (mapped,) = on_device([tensor], CUDA)
        assert mapped.device == CUDA
        assert mapped.dtype == tensor.dtype
        assert torch.equal(mapped.cpu(), tensor)
        mapped.mul_(2)
        torch.cuda.synchronize()
        assert torch.equal(mapped.cpu(), tensor)
        tensor.add_(1)
        assert torch.equal(mapped.clone().cpu(), tensor)
        rows = mapped[len(mapped) // 2 :]
        rows.copy_(torch.zeros_like(rows))
        torch.cuda.synchronize()
        assert not tensor[len(tensor) // 2 :].any()
