"""What fuzzing has found, by name."""

from __future__ import annotations

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models
from torchrec_cafe import ops
from torchrec_cafe.distributed.input import check_bags
from torchrec_cafe.ops import SlotMapState


def announced() -> tuple[SlotMapState, torch.Tensor]:
    state = SlotMapState.empty(4)
    return state, ops.announce_rows(torch.tensor([3, 5]), state, 1).rows


def test_a_row_that_is_named_twice_is_refused():
    state, rows = announced()
    twice, before = rows[[0, 1, 0]], [state.entries.clone(), state.slots.clone()]
    with pytest.raises(ValueError, match="plan_slots: .* got 3, which is not, or twice"):
        ops.plan_slots(twice, state, oldest=0, urgent=True, train=True)
    with pytest.raises(ValueError, match="retract_rows: .* got 3, which is not, or twice"):
        ops.retract_rows(twice, state)
    assert torch.equal(state.entries, before[0])
    assert torch.equal(state.slots, before[1])
    assert ops.plan_slots(rows, state, oldest=0, urgent=True, train=True).shortage == 0


def test_sizes_whose_product_overflows_are_refused():
    keys, shards = torch.tensor([1]), torch.tensor([0], dtype=torch.int32)
    found = ops.Lookups(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0]).int())
    ones, features = torch.ones(1, 4), torch.tensor([0])
    options = {"features": features, "shape": (2**32, 2**32), "num_hashes": 1}
    with pytest.raises(ValueError, match="weights of a rank.* fewer than 2"):
        ops.factor_gradients(ones, ones, found, keys, shards, **options)


def test_what_is_written_shares_no_memory_with_what_is_read():
    memory = torch.zeros(2, 2, dtype=torch.int64)
    ids, offsets = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="`out_of_range` must share no memory"):
        ops.pool_keys(ids, offsets, memory, memory.view(-1)[:2])
    rows = torch.rand(4, 4)
    with pytest.raises(ValueError, match="`into` must share no memory"):
        ops.copy_rows(rows[1:], ids, rows, ids)


def test_owners_that_are_no_slots_are_refused():
    state = ops.SketchState.empty(shards=1, buckets=2, hot_rows=1)
    state.owners.fill_(8)
    with pytest.raises(ValueError, match="`owners` must be -1 or slots of the shard"):
        ops.rebalance(state, torch.tensor([0]))


def test_lengths_whose_sum_wraps_are_refused():
    lengths = torch.tensor([2**62] * 4 + [3])
    batch = KeyedJaggedTensor(keys=["f"], values=torch.tensor([1, 2, 3]), lengths=lengths)
    with pytest.raises(ValueError, match=r"features \['f'\]: lengths .* 3, got .* and more"):
        check_bags(batch)


def test_a_table_without_rows_is_refused_by_name():
    table = EmbeddingBagConfig(
        name="t_none",
        num_embeddings=0,
        embedding_dim=8,
        feature_names=["f"],
        weight_init_min=-1.0,
        weight_init_max=1.0,
    )
    module = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
    constraints = {"t_none": tc.ParameterConstraints(table=models.HASH)}
    with pytest.raises(ValueError, match="'t_none': num_embeddings must be in .*, got 0"):
        models.planner(constraints, 1).plan(module, [models.sharder()])
