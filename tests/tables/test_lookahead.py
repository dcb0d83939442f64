"""Look-ahead tables against the uncached tables of FBGEMM: equal to the last bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from torchrec_cafe.tables import (
    FileStore,
    LookaheadBags,
    MemoryStore,
    RowStore,
    SlotTBE,
    StoredTable,
    on_device,
)

ROWS, DIM, TABLES, SAMPLES = 400, 8, 3, 16
CPU = torch.device("cpu")
OPTIMIZERS = (
    EmbOptimType.EXACT_SGD,
    EmbOptimType.EXACT_ADAGRAD,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
)
Batch = tuple[Tensor, Tensor]


class SlowStore(RowStore):
    """A store that takes its time, never the same."""

    def __init__(self, num_rows: int, like: Sequence[Tensor]) -> None:
        self._store = MemoryStore(num_rows, like)
        self.tensors = self._store.tensors
        self._random = random.Random(0)

    def read(self, rows: Tensor, into: Sequence[Tensor], at: Tensor) -> None:
        time.sleep(self._random.choice((0, 0, 0.001, 0.004)))
        self._store.read(rows, into, at)

    def write(self, rows: Tensor, source: Sequence[Tensor], at: Tensor) -> None:
        time.sleep(self._random.choice((0, 0, 0.001, 0.004)))
        self._store.write(rows, source, at)

    def sync(self) -> None:
        self._store.sync()


class BrokenStore(SlowStore):
    """A store whose disk fails when it is told to."""

    fails = False

    def read(self, rows: Tensor, into: Sequence[Tensor], at: Tensor) -> None:
        if self.fails:
            raise OSError("the disk is gone")
        super().read(rows, into, at)


class Pair:
    """The same tables twice: look-ahead, and FBGEMM's own."""

    def __init__(
        self,
        num_slots: int,
        optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        store: Callable[[int, Sequence[Tensor]], RowStore] = MemoryStore,
        precision: SparseType = SparseType.FP32,
        pooling: PoolingMode = PoolingMode.SUM,
        device: torch.device = CPU,
    ) -> None:
        # On CUDA the random bits that FP16 weights are rounded with depend on where a row lies.
        fused = {"optimizer": optimizer, "learning_rate": 0.1, "stochastic_rounding": False}
        self.tbe = SlotTBE(
            num_slots,
            DIM,
            weights_precision=precision,
            device=device,
            fused_params=fused,
            pooling_mode=pooling,
        )
        self.store = store(TABLES * ROWS, self.tbe.physical_tensors())
        tables = [StoredTable(f"t{number}", ROWS, 1) for number in range(TABLES)]
        self.bags = LookaheadBags(tables, self.tbe, self.store)
        rows = on_device(self.store.tensors, self.tbe.physical_tensors()[0].device)
        self.tbe.present(rows, [ROWS] * TABLES, self.bags.flush)
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        if device == CPU:
            place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.whole = SplitTableBatchedEmbeddingBagsCodegen(
            [(ROWS, DIM, *place)] * TABLES,
            weights_precision=precision,
            pooling_mode=pooling,
            device=device,
            **fused,
        )
        generator = torch.Generator().manual_seed(0)
        for ours, theirs in zip(
            self.tbe.split_embedding_weights(), self.whole.split_embedding_weights(), strict=True
        ):
            values = torch.randn(ROWS, DIM, generator=generator)
            ours.copy_(values)
            theirs.copy_(values)

    @property
    def tbe_slots(self) -> int:
        """Slots of the scratchpad."""
        return len(self.tbe.physical_tensors()[0])

    def step(self, batch: Batch, weights: Tensor | None = None) -> None:
        """Train both, and compare what they look up."""
        ours = self.bags(*batch, weights)
        ids, offsets = (part.long() for part in batch)
        theirs = self.whole(ids, offsets, weights)
        assert torch.equal(ours, theirs)
        grad = torch.sin(torch.arange(ours.numel(), device=ours.device) * 0.7).view_as(ours)
        ours.backward(grad)
        theirs.backward(grad)

    def run(self, batches: Sequence[Batch], depth: int) -> None:
        """Train both on all batches."""
        for number, batch in enumerate(batches):
            for coming in range(number, min(number + depth + 1, len(batches)) if depth else number):
                self.bags.look_ahead(*batches[coming])
            self.step(batch)
        self.compare()

    def compare(self) -> None:
        """Weights and states are equal."""
        self.tbe.flush()
        assert_equal(self.tbe.split_embedding_weights(), self.whole.split_embedding_weights())
        for ours, theirs in zip(
            self.tbe.split_optimizer_states(), self.whole.split_optimizer_states(), strict=True
        ):
            assert_equal(ours, theirs)


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def bags_of(lengths: Tensor, ids: Tensor) -> Batch:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return ids, offsets


def trace(kind: str, steps: int, seed: int = 0) -> list[Batch]:
    """Batches of up to three ids a bag."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(steps):
        lengths = torch.randint(0, 4, (TABLES * SAMPLES,), generator=generator)
        size = int(lengths.sum())
        uniform = torch.rand(size, generator=generator)
        if kind == "random":
            ids = uniform * ROWS
        elif kind == "zipf":
            ids = ROWS**uniform - 1
        elif kind == "same":
            ids = torch.arange(size) % 20
        else:  # no two neighbouring batches have a row in common
            ids = (uniform + step % 8) * ROWS / 8
        batches.append(bags_of(lengths, ids.long().clamp_(0, ROWS - 1)))
    return batches


def distinct(batches: Sequence[Batch]) -> int:
    """Distinct rows of all batches together."""
    keys: set[int] = set()
    for ids, offsets in batches:
        table = (torch.arange(len(offsets) - 1) // SAMPLES).repeat_interleave(offsets.diff())
        keys |= set((table * ROWS + ids).tolist())
    return len(keys)


def window(batches: Sequence[Batch], depth: int) -> int:
    """Slots that are enough to look ahead so far."""
    return max(distinct(batches[n : n + depth + 1]) for n in range(len(batches)))


@pytest.mark.parametrize("kind", ["random", "zipf", "same", "new"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_500_steps_are_those_of_whole_tables(kind, optimizer):
    batches = trace(kind, 500)
    for depth, steps in ((0, 100), (1, 100), (4, 500)):
        pair = Pair(window(batches[:steps], depth), optimizer)
        pair.run(batches[:steps], depth)
        statistics = pair.bags.statistics
        assert statistics.batches == steps
        assert statistics.hits + statistics.fills == statistics.rows
        assert (statistics.critical_misses == 0) == (depth > 0)


@pytest.mark.parametrize("depth", range(1, 9))
def test_any_depth_with_slots_for_exactly_one_window(depth):
    batches = trace("zipf", 60, seed=depth)
    slots = window(batches, depth)
    pair = Pair(slots)
    pair.run(batches, depth)
    assert pair.bags.statistics.critical_misses == 0
    fewer = Pair(max(window(batches, 0), slots // 2))  # looks ahead as far as it can
    fewer.run(batches, depth)


def test_slow_stores_change_nothing():
    batches = trace("zipf", 80)
    for depth in (0, 2, 6):
        pair = Pair(window(batches, depth), store=SlowStore)
        pair.run(batches, depth)
        assert pair.bags.statistics.seconds_moving > 0.02


def test_files_change_nothing(tmp_path: Path):
    batches = trace("random", 60)

    def store(num_rows: int, like: Sequence[Tensor]) -> FileStore:
        return FileStore(tmp_path / "rows", num_rows, like, io_threads=4)

    pair = Pair(window(batches, 2), store=store)
    pair.run(batches, 2)
    pair.store.sync()
    expected = TABLES * ROWS * DIM * 4
    assert (tmp_path / "rows" / "weights").stat().st_size == expected
    with pytest.raises(
        ValueError, match=r"weights is in use by another training, .* `path` of its own"
    ):
        store(TABLES * ROWS, pair.tbe.physical_tensors())


@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_dtypes_pooling_and_weights(precision, pooling):
    batches = trace("zipf", 20)
    pair = Pair(window(batches, 2), precision=precision, pooling=pooling)
    pair.run(batches, 2)
    weighted = Pair(window(batches, 0), precision=precision)
    for batch in batches:
        weighted.step(batch, torch.linspace(-1, 2, len(batch[0])))
    weighted.compare()


def test_weights_get_their_gradient():
    batch = trace("zipf", 1)[0]
    pair = Pair(window([batch], 0))
    ours, theirs = (torch.linspace(-1, 2, len(batch[0])).requires_grad_() for _ in range(2))
    pair.bags(*batch, ours).square().sum().backward()
    pair.whole(*batch, theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_int32_ids_empty_bags_and_empty_batches():
    batches = [(ids.int(), offsets.int()) for ids, offsets in trace("zipf", 10)]
    nothing = bags_of(torch.zeros(TABLES * SAMPLES, dtype=torch.int64), torch.empty(0))
    batches.insert(3, (nothing[0].int(), nothing[1].int()))
    pair = Pair(window(batches, 3))
    pair.run(batches, 3)


def test_ids_out_of_range_are_counted_and_taken_as_id_0():
    pair = Pair(50)
    ids = torch.tensor([5, -1, ROWS, 7])
    offsets = torch.tensor([0, 2, 2, 4])  # one sample: two ids, none, two
    looked_up = pair.bags(ids, offsets)
    expected = pair.whole(torch.tensor([5, 0, 0, 7]), offsets)
    assert torch.equal(looked_up, expected)
    assert pair.bags.out_of_range.tolist() == [1, 0, 1]


def test_evaluation_between_steps_disturbs_nothing():
    batches, others = trace("zipf", 40), trace("random", 40, seed=1)
    pair = Pair(window(batches, 4))
    for number, batch in enumerate(batches):
        for coming in batches[number : number + 5]:
            pair.bags.look_ahead(*coming)
        with torch.no_grad():  # the slots are full of what was looked ahead for
            assert torch.equal(pair.bags(*others[number]), pair.whole(*others[number]))
        pair.step(batch)
    pair.compare()


def test_rows_that_are_only_looked_up_are_not_written_back():
    pair = Pair(150)
    with torch.no_grad():
        for batch in trace("random", 20):
            pair.bags(*batch)
    pair.bags.flush()
    assert pair.bags.statistics.bytes_in > 0
    assert pair.bags.statistics.bytes_out == 0


def test_a_store_that_is_changed_from_outside_is_read_anew():
    batches = trace("same", 12)
    pair = Pair(window(batches, 3))
    pair.run(batches[:5], 3)
    for coming in batches[5:8]:
        pair.bags.look_ahead(*coming)
    pair.compare()  # flushes, as every access to the state does
    for tensor in pair.store.tensors:
        tensor.mul_(0.5)
    for table in range(TABLES):
        pair.whole.split_embedding_weights()[table].mul_(0.5)
        pair.whole.split_optimizer_states()[table][0].mul_(0.5)
    pair.run(batches[5:], 3)


def test_state_read_between_forward_and_backward_loses_no_update():
    batches = trace("zipf", 4)
    pair = Pair(window(batches, 0))
    for batch in batches:
        ours, theirs = pair.bags(*batch), pair.whole(*batch)
        pair.bags.flush()
        ours.sum().backward()
        theirs.sum().backward()
    pair.compare()


def test_a_rank_without_rows_gives_zeros_for_ids_out_of_range():
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1}
    tbe = SlotTBE(1, DIM, weights_precision=SparseType.FP32, device=CPU, fused_params=fused)
    store = MemoryStore(0, tbe.physical_tensors())
    bags = LookaheadBags([StoredTable("t", 0, 2)], tbe, store)
    for ids in ([], [3, 4]):
        offsets = torch.tensor([0, 0, len(ids), len(ids), len(ids)])
        looked_up = bags(torch.tensor(ids, dtype=torch.int64), offsets)
        assert torch.equal(looked_up, torch.zeros(2, 2 * DIM))
        looked_up.sum().backward()
    bags.flush()
    assert bags.out_of_range.tolist() == [2, 0]
