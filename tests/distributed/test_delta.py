"""Incremental exports to served models, on gloo ranks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from tests.distributed.test_exports import KINDS, Model
from torchrec_cafe.serving import ModelDelta, ServedEmbeddingBagCollection

DTYPES = {"factors": torch.float32, "multi_level": torch.float16}


def _model(kind: str) -> Any:
    table, sharding_type = KINDS[kind]
    constraint = tc.ParameterConstraints(table=table, sharding_types=[sharding_type])
    big = {name: constraint for name in ("t_big", "t_small")}
    return models.sharded(Model(), models.constraints() | big)


def _train(model: Any, count: int, seed: int) -> None:
    for batch in models.batches(count, 8, seed=seed):
        model(batch).pow(2).mean().backward()


def _hot_ids(model: Any) -> dict[str, Tensor]:
    """The ids of each table that own a row, by looking all of them up."""
    hot = {}
    for name, table in tc.gather_tables(model).items():
        ids = torch.arange(table.size[0])
        rows, starts, _, _ = table.group.row_map([name])(ids, torch.arange(len(ids) + 1))
        pool = table.group.layout.pool
        owned = rows[starts[:-1]] >= pool.offset
        hot[name] = ids[owned & (pool.hot_rows_per_shard > 0)]
    return hot


def _same(one: Any, other: Any) -> None:
    """The same bits in the map and in all rows."""
    for (name, mine), (_, theirs) in zip(
        sorted(one.state_dict().items()), sorted(other.state_dict().items()), strict=True
    ):
        if not name.endswith("version"):
            assert torch.equal(mine, theirs), name


def _saved(delta: ModelDelta) -> ModelDelta:
    file = io.BytesIO()
    torch.save(delta, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _follow(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _model(kind)
    dtype = DTYPES.get(kind, torch.int8)
    tracker = tc.DeltaTracker(model)
    _train(model, 20, seed=0)
    late: Any = tracker.to_inference(Model(), dtype=dtype)  # gets both deltas at once
    early: Any = tc.to_inference(model, Model(), dtype=dtype)
    if early is not None:
        early.ebc.version.fill_(tracker.version)
    hot = [_hot_ids(model)]
    deltas = []
    for step in (1, 2):
        _train(model, 3, seed=step)
        deltas.append(tracker.delta(since=step))
        hot.append(_hot_ids(model))
    both = tracker.delta(since=1)
    fresh: Any = tc.to_inference(model, Model(), dtype=dtype)
    if dist.get_rank() > 0:
        assert all(delta is None for delta in (*deltas, both))
        return {}
    for delta in deltas:
        tc.apply_delta(early, _saved(delta))
    tc.apply_delta(late, both)
    _same(early, fresh)
    _same(late, fresh)
    for batch in models.batches(1, 24, seed=9):
        assert torch.equal(early(batch), fresh(batch))
    assert (int(early.ebc.version), int(late.ebc.version)) == (3, 4)
    _check_hot(deltas[0], hot[0], hot[1])
    _check_hot(both, hot[0], hot[2])
    shares = {}
    for name, group in deltas[0].collections["ebc"].groups.items():
        (bags,) = (bags for bags in early.ebc.groups if bags.name == name)
        shares[name] = len(group.rows.rows) / len(bags.bags.embedding_bags[name].weight)
    return shares


def _check_hot(delta: ModelDelta, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for group in delta.collections["ebc"].groups.values():
        for table, ids in group.became_hot.items():
            became = after[table][~torch.isin(after[table], before[table])]
            stopped = before[table][~torch.isin(before[table], after[table])]
            assert torch.equal(ids, became)
            assert torch.equal(group.stopped_being_hot[table], stopped)


def _refused() -> list[str]:
    model = _model("cafe")
    tracker = tc.DeltaTracker(model)
    served: Any = tracker.to_inference(Model())
    _train(model, 2, seed=0)
    tracker.delta(since=1)
    late = tracker.delta(since=2)
    before = models.local_state(model)
    model.load_state_dict(model.state_dict())  # all rows count as touched
    after_load = tracker.delta(since=3)
    assert all(torch.equal(before[k], v) for k, v in models.local_state(model).items())
    attempts = [
        lambda: tc.DeltaTracker(model),
        lambda: tracker.delta(since=5),
        lambda: tc.convert(model, "nowhere", counts={}),
    ]
    if dist.get_rank() == 0:
        rows = after_load.collections["ebc"].groups["cafe_pool_t_big"].rows.rows
        assert torch.equal(rows, torch.arange(len(rows)))
        attempts += [
            lambda: tc.apply_delta(served, late),
            lambda: tc.apply_delta(Model(), late),
        ]
        assert isinstance(served.ebc, ServedEmbeddingBagCollection)
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
            attempt()
        messages.append(str(error.value))
    return messages


def _follow_all() -> tuple[dict[str, dict[str, float]], list[str]]:
    return {kind: _follow(kind) for kind in KINDS}, _refused()


def test_deltas_bring_a_served_model_up_to_date(tmp_path: Path):
    (shares, messages), _ = run_ranks(2, tmp_path, _follow_all)
    for name in ("cafe", "multi_level", "quotient_remainder"):
        assert all(0 < share < 0.5 for share in shares[name].values()), shares
    expected = (
        "'ebc' has a DeltaTracker already",
        "`since` must be in [0, 4], got 5",
        "convert the model before it has a DeltaTracker",
        "the delta leads from version 2 to 3, but 'ebc' has version 1",
        "the model must have a ServedEmbeddingBagCollection at 'ebc', got EmbeddingBagCollection",
    )
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(start)
