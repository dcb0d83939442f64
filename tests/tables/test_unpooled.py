"""Ids looked up one by one: as bags of one id each, and what the sketch learns of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor

from tests.tables import test_compressed as shared
from tests.tables import test_mem_rec as mem_rec
from torchrec_cafe.ops import ID_BITS, SketchState, reference
from torchrec_cafe.tables import (
    CompressedBags,
    QuotientRemainderRows,
    RowRangeTBE,
    TableLayout,
)
from torchrec_cafe.tables.hot_rows import NORM_DECAY

#: ids of two features
FIRST, SECOND = [3, 17, 3, 39, 8, 3], [4, 0, 4, 2, 2, 1]


def quotient_remainder() -> CompressedBags:
    fused_params = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.5}
    sizes = {"big": (40, 7, 13), "small": (5, 3, 5)}  # ids, remainder rows, rows
    tbe = RowRangeTBE(
        [rows for *_, rows in sizes.values()],
        8,
        weights_precision=SparseType.FP32,
        device=shared.CPU,
        fused_params=fused_params,
    )
    weights = tbe.physical_tensors()[0]
    weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    tables = [
        TableLayout(
            name=name,
            num_ids=ids,
            shared_rows=remainders,
            first_row=0,
            num_rows=rows,
            num_features=1,
            index=-1,
        )
        for name, (ids, remainders, rows) in sizes.items()
    ]
    return CompressedBags(QuotientRemainderRows(tables, shared.CPU), tbe)


SGD = EmbOptimType.EXACT_SGD
MAKERS: dict[str, Callable[[], CompressedBags]] = {
    "cafe": lambda: shared.make(SGD),
    "second_rows": lambda: shared.make(SGD, second=2),
    "factors": lambda: shared.make(SGD, second=2, num_weight_hashes=3),
    "quotient_remainder": quotient_remainder,
    "mem_rec": lambda: mem_rec.make(SGD, num_hashes=2, num_weight_hashes=3),
}


def of_one_id(lookup: Callable[..., Tensor], bags: CompressedBags) -> tuple[Tensor, ...]:
    """What a lookup gives for bags of one id, and the tensors after a step."""
    ids, offsets = torch.tensor(FIRST + SECOND), torch.arange(len(FIRST + SECOND) + 1)
    vectors = lookup(ids, offsets)
    dim = vectors.numel() // len(ids)
    vectors = vectors.view(len(FIRST), 2, dim).transpose(0, 1) if lookup is bags else vectors
    vectors = vectors.reshape(len(ids), dim)
    pull = torch.arange(1.0, len(ids) + 1)[:, None]
    (vectors * pull).sum().backward()
    weights = bags.rows.state.state_tensors() if bags.rows.state is not None else {}
    tables = [tensor for name, tensor in weights.items() if name.startswith("weight_table")]
    return vectors.detach(), *bags.tbe.physical_tensors(), *tables


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_bags_of_one_id(name: str):
    for hot in (False, True):
        pooled, unpooled = MAKERS[name](), MAKERS[name]()
        for bags in (pooled, unpooled):
            if hot and bags.pool is not None:  # the same ids in both
                for _ in range(3):
                    shared.step(bags, FIRST)
        expected = of_one_id(pooled, pooled)
        found = of_one_id(unpooled.unpooled, unpooled)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            torch.testing.assert_close(
                unpooled.unpooled(torch.tensor(FIRST), torch.tensor([0, 2, 2, 6, 6, 6, 6])),
                pooled(torch.tensor(FIRST + SECOND), torch.arange(13))[:, : expected[0].shape[1]],
            )


@pytest.mark.parametrize("name", MAKERS)
def test_bags_of_any_length_give_their_ids_in_order(name: str):
    bags = MAKERS[name]()
    ids = torch.tensor([3, 17, 3, 4])
    with torch.no_grad():
        whole = bags.unpooled(ids, torch.tensor([0, 3, 3, 3, 4]))  # [3 17 3] [] | [] [4]
        parts = [
            bags.unpooled(ids[:2], torch.tensor([0, 1, 2, 2, 2])),
            bags.unpooled(ids[2:3], torch.tensor([0, 1, 1])),
            bags.unpooled(ids[3:], torch.tensor([0, 0, 1])),
        ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("name", MAKERS)
def test_no_ids_and_no_samples(name: str):
    bags = MAKERS[name]()
    before = [tensor.clone() for tensor in bags.tbe.physical_tensors()]
    for offsets in ([0], [0, 0, 0, 0, 0]):
        vectors = bags.unpooled(torch.empty(0, dtype=torch.int64), torch.tensor(offsets))
        assert vectors.shape == (0, before[0].shape[1])
        vectors.sum().backward()
    for tensor, old in zip(bags.tbe.physical_tensors(), before, strict=True):
        assert torch.equal(tensor, old)


def definition(
    bags: CompressedBags, state: SketchState, norms: Tensor, grad: Tensor, ids: list[int]
) -> None:
    """What the sketch learns of ids of the first table, in plain Python."""
    assert bags.pool is not None
    keys, shards, lengths = [], [], []
    for id_, row in zip(ids, grad.double(), strict=True):
        keys.append((0 << ID_BITS) | id_)
        shards.append(id_ * shared.SHARED // shared.IDS * shared.SHARDS // shared.SHARED)
        lengths.append(float(row.pow(2).sum().sqrt()))
    norms *= NORM_DECAY
    for shard, length in zip(shards, lengths, strict=True):
        if torch.tensor(length).isfinite():
            norms[shard, 0] += torch.tensor([length, 1.0])
    importance = [
        length * float(norms[shard, 0, 1] / norms[shard, 0, 0])
        for shard, length in zip(shards, lengths, strict=True)
    ]
    reference.observe(
        state, torch.tensor(keys), torch.tensor(shards, dtype=torch.int32), torch.tensor(importance)
    )


def test_importance_is_in_units_of_the_tables_mean_in_the_shard():
    bags = shared.make(threshold=1e9)
    assert bags.pool is not None
    state = SketchState(**{k: v.clone() for k, v in bags.pool.sketch.tensors().items()})
    norms = bags.pool.state_tensors()["sketch_norms"].clone()
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        vectors = bags.unpooled(torch.tensor(FIRST + [2]), torch.tensor([0, 2, 6, 6, 7]))
        grad = torch.randn(vectors.shape, generator=generator)
        grad[1] = torch.nan if step == 2 else grad[1]
        vectors.backward(grad)
        definition(bags, state, norms, grad[:6], FIRST)
    learned = bags.pool.state_tensors()
    torch.testing.assert_close(learned["sketch_norms"], norms)
    scores = bags.pool.sketch.scores
    torch.testing.assert_close(scores, state.scores, rtol=1e-5, atol=0)
    assert bags.pool.statistics()["non_finite"] == 1


def test_frequency_counts_each_id():
    bags = shared.make(importance="frequency", threshold=1e9)
    assert bags.pool is not None
    for _ in range(2):
        bags.unpooled(torch.tensor(FIRST), torch.tensor([0, 6, 6])).sum().backward()
    assert sorted(bags.pool.sketch.scores[bags.pool.sketch.scores > 0].tolist()) == [2, 2, 2, 6]
