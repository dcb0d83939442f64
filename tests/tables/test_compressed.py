"""Compressed bags without distribution: promotion, demotion, learning, against plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.config import Cafe
from torchrec_cafe.ops import COLD, MEDIUM, PoolRows, reference
from torchrec_cafe.tables import (
    CompressedBags,
    IdFactors,
    PoolLayout,
    QuotientRemainderRows,
    RowRangeTBE,
    SharedRows,
    TableLayout,
    WeightTable,
)

IDS, SHARED, HOT, SHARDS, DIM = 40, 6, 2, 2, 4
CPU = torch.device("cpu")
OPTIMIZERS = [
    EmbOptimType.EXACT_SGD,
    EmbOptimType.EXACT_ADAGRAD,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
]


def make(
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    precision: SparseType = SparseType.FP32,
    second: int = 0,
    **options: Any,
) -> CompressedBags:
    """One tracked table of 40 ids in 6 shared rows, one whole table of 5, and 4 hot rows.

    With ``second``, each of the two shards has so many second rows besides; with
    ``num_weight_hashes``, eight weights.
    """
    options = {"half_life": math.inf, "rebalance_interval": 1} | options
    kind = Cafe(compression=2, num_shards=SHARDS, **options)
    fused_params = {"optimizer": optimizer, "learning_rate": 0.5, "eps": 0.1}
    tbe = RowRangeTBE(
        [SHARED, 5, SHARDS * (HOT + second)],
        DIM,
        weights_precision=precision,
        device=CPU,
        fused_params=fused_params,
    )
    weights = tbe.physical_tensors()[0]
    weights.copy_(torch.arange(weights.numel()).view_as(weights) / 10)
    common = {"first_row": 0, "num_features": 1}
    tables = [
        TableLayout(
            name="big", num_ids=IDS, shared_rows=SHARED, num_rows=SHARED, index=0, **common
        ),
        TableLayout(name="whole", num_ids=5, shared_rows=5, num_rows=5, index=-1, **common),
    ]
    pool = PoolLayout(
        kind=kind,
        num_shards=SHARDS,
        first_shard=0,
        shards_held=SHARDS,
        buckets_per_shard=4,
        rows=PoolRows(offset=SHARED + 5, hot_rows_per_shard=HOT, second_rows_per_shard=second),
        num_medium=3 * second,
    )
    factors = None
    if kind.weight_hashes > 0:
        table = WeightTable(
            0, (SHARDS, 16), per_row=16, start=0.3, device=CPU, fused_params=fused_params
        )
        factors = IdFactors(table, kind.weight_hashes, tbe)
    return CompressedBags(SharedRows(tables, pool, CPU, factors), tbe)


def step(bags: CompressedBags, ids: list[int], pull: float = 1.0) -> Tensor:
    """Train one batch with one id of the big table per sample and none of the other."""
    offsets = torch.tensor([*range(len(ids) + 1), *[len(ids)] * len(ids)])
    pooled = bags(torch.tensor(ids), offsets)
    (pooled * pull).sum().backward()
    return pooled.detach()


def rows_of(bags: CompressedBags, id_: int) -> int:
    """Physical row of an id of the big table."""
    pool = bags.pool
    assert pool is not None
    remapped = reference.remap(
        torch.tensor([id_]), torch.tensor([0, 1, 1]), bags.rows._tables, pool.hot_rows()
    )
    return int(remapped.rows)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_promotion_copies_the_trained_row_with_its_state_after_the_update(optimizer):
    bags = make(optimizer)
    shared = rows_of(bags, 3)
    assert shared < SHARED
    step(bags, [3, 3, 17])
    # The step has updated the shared row; nothing has moved yet.
    trained = [tensor[shared].clone() for tensor in bags.tbe.physical_tensors()]
    assert rows_of(bags, 3) == shared
    bags.settle()
    hot = rows_of(bags, 3)
    assert hot >= SHARED + 5
    for tensor, expected in zip(bags.tbe.physical_tensors(), trained, strict=True):
        assert torch.equal(tensor[hot], expected)
    # From now on only the hot row learns.
    step(bags, [3])
    weights = bags.tbe.physical_tensors()[0]
    assert torch.equal(weights[shared], trained[0])
    assert not torch.equal(weights[hot], trained[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_demotion_clears_the_row_and_its_state(optimizer):
    bags = make(optimizer, threshold=3.0, half_life=0.25)  # bags per hot row, of which there are 4
    step(bags, [3] * 8)
    bags.settle()
    hot = rows_of(bags, 3)
    assert hot >= SHARED + 5
    for _ in range(8):  # eight half-lives of other ids
        step(bags, [17])
    bags.settle()
    assert rows_of(bags, 3) < SHARED
    for tensor in bags.tbe.physical_tensors():
        assert not tensor[hot].any()
    assert bags.pool is not None
    assert bags.pool.statistics()["demoted"] >= 1


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, IDS - 1), st.floats(-4, 4, width=16)), min_size=1),
        max_size=6,
    )
)
@settings(max_examples=30, deadline=None)
def test_every_id_reads_the_row_that_it_trains(batches):
    """A plain table of physical rows, looked up and updated by hand, gives the same outputs."""
    bags = make(EmbOptimType.EXACT_SGD)
    plain = bags.tbe.physical_tensors()[0].clone()
    for batch in batches:
        ids = [id_ for id_, _ in batch]
        bags.settle()
        # What settling has copied or cleared is taken over; what it was is tested above.
        plain.copy_(bags.tbe.physical_tensors()[0])
        rows = torch.tensor([rows_of(bags, id_) for id_ in ids])
        offsets = torch.tensor([*range(len(ids) + 1), *[len(ids)] * len(ids)])
        pooled = bags(torch.tensor(ids), offsets)
        torch.testing.assert_close(pooled[:, :DIM].detach(), plain[rows])
        assert not pooled[:, DIM:].any()
        pulls = torch.tensor([pull for _, pull in batch])
        (pooled * pulls[:, None]).sum().backward()
        plain.index_add_(0, rows, -0.5 * pulls[:, None].expand(-1, DIM))
        torch.testing.assert_close(bags.tbe.physical_tensors()[0], plain)


def test_importance_is_the_norm_of_the_bags_gradient_times_the_weight():
    bags = make()
    pool = bags.pool
    assert pool is not None
    # Sample 0 has ids 3 and 17 with weights 1 and 3; sample 1 has id 3 with weight 1.
    pooled = bags(
        torch.tensor([3, 17, 3]), torch.tensor([0, 2, 3, 3, 3]), torch.tensor([1.0, 3.0, 1.0])
    )
    (pooled * torch.tensor([[2.0], [4.0]])).sum().backward()
    sketch = pool.sketch
    found = {}
    for id_ in (3, 17):
        shard = id_ * SHARED // IDS * SHARDS // SHARED
        place = reference.find(sketch.buckets, shard, id_)
        assert place is not None
        total, count = pool.state_tensors()["sketch_norms"][shard, 0]
        found[id_] = float(sketch.scores[shard][place] * total / count)
    length = DIM**0.5
    assert found[3] == pytest.approx(2 * length * 1 + 4 * length * 1)
    assert found[17] == pytest.approx(2 * length * 3)


def test_evaluation_and_no_grad_do_not_learn():
    bags = make()
    assert bags.pool is not None
    bags.eval()
    step(bags, [3, 3])
    bags.train()
    with torch.no_grad():
        bags(torch.tensor([3]), torch.tensor([0, 1, 1]))
    assert int(bags.pool.sketch.steps.sum()) == 0
    step(bags, [3, 3])
    assert int(bags.pool.sketch.steps.sum()) == SHARDS


def test_non_finite_gradients_are_counted_and_skipped():
    bags = make(EmbOptimType.EXACT_SGD)
    assert bags.pool is not None
    step(bags, [3, 17], pull=float("nan"))
    assert bags.pool.statistics()["non_finite"] == 2
    assert (bags.pool.sketch.hot_rows <= COLD).all()
    assert not bags.pool.sketch.scores.any()


def test_half_precision_rows():
    bags = make(precision=SparseType.FP16)
    for _ in range(5):
        step(bags, [3, 3, 17, 20])
    bags.settle()
    assert bags.tbe.physical_tensors()[0].dtype == torch.float16
    assert rows_of(bags, 3) >= SHARED + 5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_promoted_medium_id_goes_on_from_the_sum_of_its_rows(optimizer):
    bags = make(optimizer, second=2, threshold=3.0)
    pool = bags.pool
    assert pool is not None
    step(bags, [3])
    bags.settle()
    assert (pool.sketch.hot_rows == MEDIUM).any()
    before = step(bags, [3, 3, 3, 3])[0, :DIM]  # settles, looks up two rows, trains both
    tensors = bags.tbe.physical_tensors()
    shard = 3 * SHARED // IDS * SHARDS // SHARED
    second = SHARED + 5 + shard * (HOT + 2) + HOT + reference.second_row(3, 2)
    shared = rows_of(bags, 3)
    assert shared < SHARED
    trained = [(tensor[shared] + tensor[second]).clone() for tensor in tensors]
    assert not torch.equal(trained[0], before)
    bags.settle()
    hot = rows_of(bags, 3)
    assert hot >= SHARED + 5
    assert torch.equal(tensors[0][hot], trained[0])
    for state, sum_of_two in zip(tensors[1:], trained[1:], strict=True):
        assert torch.equal(state[hot], sum_of_two / 2)


def test_both_rows_of_a_quotient_remainder_table_are_trained():
    tbe = RowRangeTBE(
        [7 + 6],
        DIM,
        weights_precision=SparseType.FP32,
        device=CPU,
        fused_params={"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 1.0},
    )
    weights = tbe.physical_tensors()[0]
    weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    table = TableLayout(
        name="t", num_ids=IDS, shared_rows=7, first_row=0, num_rows=13, num_features=1, index=-1
    )
    bags = CompressedBags(QuotientRemainderRows([table], CPU), tbe)
    plain = weights.clone()
    pooled = bags(torch.tensor([3, 39, 3]), torch.tensor([0, 2, 3]), torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.stack([plain[3] + plain[7] + 2 * (plain[4] + plain[12]), plain[3] + plain[7]])
    expected[1] *= 3
    torch.testing.assert_close(pooled, expected)
    pooled.sum().backward()
    plain.index_add_(0, torch.tensor([3, 7]), torch.full((2, DIM), -4.0))
    plain.index_add_(0, torch.tensor([4, 12]), torch.full((2, DIM), -2.0))
    torch.testing.assert_close(weights, plain)


def test_frequency_counts_weights_not_gradients():
    bags = make(importance="frequency")
    assert bags.pool is not None
    step(bags, [3, 3, 17], pull=100.0)
    sketch = bags.pool.sketch
    held = dict(zip(sketch.keys.flatten().tolist(), sketch.scores.flatten().tolist(), strict=True))
    assert (held[3], held[17]) == (2.0, 1.0)


def test_hot_share_is_that_of_a_recent_batch():
    bags = make()
    assert bags.pool is not None
    for _ in range(17):
        step(bags, [3, 3, 3, 17])
    assert bags.pool.statistics()["hot_share"] == 1.0
    fresh = make(threshold=1e9)
    assert fresh.pool is not None
    for _ in range(17):
        step(fresh, [3, 3, 3, 17])
    assert fresh.pool.statistics()["hot_share"] == 0.0


def test_ranges_of_the_tbe_are_views_of_one_table():
    bags = make()
    first, second, pool = bags.tbe.split_embedding_weights()
    assert [len(first), len(second), len(pool)] == [SHARED, 5, SHARDS * HOT]
    second.fill_(7)
    assert (bags.tbe.physical_tensors()[0][SHARED : SHARED + 5] == 7).all()
    states = bags.tbe.split_optimizer_states()
    assert [len(state[0]) for state in states] == [SHARED, 5, SHARDS * HOT]
    none = RowRangeTBE([0, 0], DIM, weights_precision=SparseType.FP32, device=CPU, fused_params={})
    assert [len(weights) for weights in none.split_embedding_weights()] == [0, 0]


def _plainly(
    bags: CompressedBags, ids: Tensor, offsets: Tensor, user: Tensor, *, hot_learn: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """What bags look up, in double precision by autograd; the rows and the weights that it used."""
    assert isinstance(bags.rows, SharedRows)
    assert bags.pool is not None
    assert bags.state is not None
    rows = bags.tbe.physical_tensors()[0].double().requires_grad_()
    weights = bags.state.state_tensors()["weight_table"].double().requires_grad_()
    batch = ops.remap(ids, offsets, bags.rows._tables, bags.pool.hot_rows())
    found = ops.Lookups(batch.rows, batch.offsets, batch.source)
    if bags.pool.layout.rows.second_rows_per_shard > 0:
        found = ops.add_second_rows(batch, bags.pool.layout.rows)
    factors = reference.key_factors(weights, batch.keys, batch.shards, num_hashes=2)
    assert (factors[batch.shards < 0] == 1).all()
    if not hot_learn:
        factors = torch.where(batch.cold_shards < 0, factors.detach(), factors)
    scales = (factors * user.double())[found.source.long()]
    bag = torch.arange(len(offsets) - 1).repeat_interleave(found.offsets.diff())
    pooled = torch.zeros((len(offsets) - 1, DIM), dtype=torch.float64)
    return pooled.index_add(0, bag, scales.unsqueeze(1) * rows[found.rows]), rows, weights


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("steps", "hot_learn"), [(6, False), (7, True)])
def test_factors_and_rows_step_as_a_dense_model(weighted: bool, steps: int, hot_learn: bool):
    """Cold, medium and hot ids, and those of a table that is kept whole."""
    bags = make(EmbOptimType.EXACT_SGD, second=2, num_weight_hashes=2)
    for _ in range(steps):
        step(bags, [3, 3, 3, 11, 11, 11, 25, 25, 30, 38], pull=0.01)
    bags.settle()
    assert bags.pool is not None
    assert bags.pool.statistics()["medium_occupancy"] > 0
    ids = torch.tensor([3, 11, 25, 30, 38, 5, 5, 0, 4, 4])
    offsets = torch.tensor([0, 2, 4, 7, 8, 9, 10, 10, 10])  # four bags of each table
    user = torch.rand(len(ids)) if weighted else torch.ones(len(ids))
    expected, rows, weights = _plainly(bags, ids, offsets, user, hot_learn=hot_learn)
    pooled = bags(ids, offsets, user if weighted else None).view(8, DIM)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-5)
    pull = torch.randn(8, DIM)
    (expected * pull.double()).sum().backward()
    (pooled * pull).sum().backward()
    assert bags.state is not None
    for before, now in (
        (rows, bags.tbe.physical_tensors()[0]),
        (weights, bags.state.state_tensors()["weight_table"]),
    ):
        assert before.grad is not None
        stepped = before.detach() - 0.5 * before.grad
        torch.testing.assert_close(now.double(), stepped, rtol=1e-5, atol=1e-5)


def test_factors_stay_with_ids_that_are_promoted():
    bags = make(EmbOptimType.EXACT_SGD, num_weight_hashes=2)
    ids, offsets = [3, 11], torch.tensor([0, 1, 2, 2, 2])
    step(bags, ids)
    expected, *_ = _plainly(bags, torch.tensor(ids), offsets, torch.ones(2))
    pooled = bags(torch.tensor(ids), offsets)  # settles
    assert bags.pool is not None
    assert bags.pool.statistics()["promoted"] == 2
    torch.testing.assert_close(pooled.view(4, DIM).double(), expected, rtol=1e-6, atol=1e-6)


def test_hot_ids_train_their_factor_in_one_step_of_four():
    bags = make(EmbOptimType.EXACT_SGD, num_weight_hashes=2)
    step(bags, [3, 11])
    bags.settle()
    assert bags.state is not None
    weights = bags.state.state_tensors()["weight_table"]

    def trains(ids: list[int]) -> bool:
        before = weights.clone()
        step(bags, ids, pull=0.01)
        return not torch.equal(weights, before)

    assert [trains([3, 11, 3]) for _ in range(2, 9)] == [n % 4 == 0 for n in range(2, 9)]
    assert trains([3, 4])  # a cold one
    bags.eval()  # no steps to count
    assert all(trains([3, 11]) for _ in range(2))


@pytest.mark.parametrize(
    ("interval", "turn"), [(1, 1), (3, 1), (4, 4), (6, 2), (8, 4), (16, 4), (20, 4)]
)
def test_every_shard_has_its_turn_once_an_interval(interval: int, turn: int):
    bags = make(rebalance_interval=interval)
    assert bags.pool is not None
    settled: list[tuple[int, int]] = []
    for number in range(1, 2 * interval + 1):
        step(bags, [3])
        if bags.pool.unsettled:
            settled += [(number, shard) for shard in bags.pool._selected().tolist()]
        bags.settle()
    assert all(number % turn == 0 for number, _ in settled)
    turns = [[number for number, which in settled if which == shard] for shard in range(SHARDS)]
    assert [second - first for first, second in turns] == [interval] * SHARDS
