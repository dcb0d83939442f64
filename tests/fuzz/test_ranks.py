"""Broken and empty batches on two ranks, of which any may have no samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import PoolingType

from tests.distributed import models
from tests.distributed.ranks import run_ranks
from tests.fuzz.batches import KEYS, Batch, batches
from tests.fuzz.bed import CAFE, DIM, Bed, Setup, collection, gradient, same_bits
from tests.fuzz.profile import fuzz
from tests.fuzz.test_models import FACTORS, HASH, LOOKAHEAD, SAMPLES

# Many processes, or many cases: on a busy machine they take long.
pytestmark = pytest.mark.timeout(900)

CASES = 60
SETUPS = {
    "factors": Setup(FACTORS, weighted=True),
    "hash, means": Setup(HASH, pooling=PoolingType.MEAN),
    "cafe, strict": Setup(CAFE, "table_wise", mode=BoundsCheckMode.FATAL),
    "samples": Setup(SAMPLES),
}


def _all(flag: bool) -> bool:
    """Whether something is so on every rank."""
    flags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return all(flags)


def _trains(setup: Setup, batch: Batch) -> bool:
    """Whether TorchRec's backward pass knows what to do: gloo gathers parts of one size only."""
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, batch.num_samples)
    return setup.sharding_type != "row_wise" or len(set(sizes)) == 1


def _check(bed: Bed, batch: Batch) -> None:
    """Run this rank's part of a batch; all ranks refuse theirs, or none does."""
    bed.reset()
    meant = batch.regrouped() if batch.is_sound() else batch
    strict = bed.setup.mode is BoundsCheckMode.FATAL
    good = batch.is_sound() and not meant.is_pruned and not (strict and meant.has_strays)
    if not _all(good):
        if not _all(not good):
            return  # a rank would wait for one that raises
        if not batch.is_sound():
            with pytest.raises((ValueError, TypeError)):
                bed.step(batch)
        assert _all(bed.changed(bed.base) == [])
        return
    run = bed.step if _trains(bed.setup, batch) else bed.look_up
    pooled = run(batch)
    after = bed.snapshot()
    bed.reset()
    same = same_bits(run(meant.clean()), pooled) and bed.changed(after) == []
    assert _all(same)
    assert pooled.shape == (batch.num_samples, len(KEYS) * DIM)


def _alike(of_ranks: tuple[Batch, Batch]) -> tuple[Batch, Batch]:
    """Gloo aborts where ranks send different dtypes to each other, under TorchRec's tables, too."""
    first, second = of_ranks
    if first.is_sound() and second.is_sound():
        both = zip(first.dtypes, second.dtypes, strict=True)
        # The wider ones: ids may be out of the range of int32.
        first.dtypes = second.dtypes = tuple(max(pair, key=lambda d: d.itemsize) for pair in both)
    return first, second


def _fuzz(name: str) -> int:
    bed, seen = Bed(SETUPS[name]), [0]
    parts = st.tuples(*[batches(weighted=bed.setup.weighted, defects=False)] * 2)
    broken = st.tuples(*[batches(weighted=bed.setup.weighted)] * 2)

    @fuzz(CASES)
    @given(st.one_of(parts, parts, broken))
    def run(of_ranks: tuple[Batch, Batch]) -> None:
        _check(bed, _alike(of_ranks)[dist.get_rank()])
        seen[0] += 1

    run()
    return seen[0]


def _plain(setup: Setup) -> DistributedModelParallel:
    """TorchRec's own row-wise tables."""
    module, sharder = collection(setup), models.sharder(setup.optimizer)
    kept = {name: row_wise(compute_kernel="fused") for name in module.embedding_bags}
    ranks = dist.get_world_size()
    plan: Any = construct_module_sharding_plan(
        module, kept, sharder=sharder, local_size=ranks, world_size=ranks, device_type="cpu"
    )
    for table in plan.values():
        table.bounds_check_mode = BoundsCheckMode.IGNORE
    return DistributedModelParallel(
        module, plan=ShardingPlan({"": plan}), sharders=[sharder], device=torch.device("cpu")
    )


def _weights(model: DistributedModelParallel) -> dict[str, Tensor]:
    names = ("embedding_bags.t_a.weight", "embedding_bags.t_b.weight", "embedding_bags.t_c.weight")
    state = models.local_state(model)
    return {name: state[name] for name in names}


def _fuzz_beside_plain_tables() -> int:
    """Strays of Lookahead tables go where those of TorchRec's row-wise tables go."""
    setup = Setup(LOOKAHEAD, mode=BoundsCheckMode.IGNORE, optimizer=EmbOptimType.EXACT_SGD)
    bed, plain, seen = Bed(setup), _plain(setup), [0]
    models.set_weights(bed.model)
    models.set_weights(plain)
    parts = st.tuples(*[batches(weighted=False, defects=False)] * 2)

    @fuzz(CASES)
    @given(parts)
    def run(of_ranks: tuple[Batch, Batch]) -> None:
        batch = _alike(of_ranks)[dist.get_rank()]
        own = KEYS.index("f_own") * batch.num_samples
        batch.bags = [
            [900 if number == -1 else number for number in bag] if at < own else [0] * len(bag)
            for at, bag in enumerate(batch.bags)
        ]
        batch.given = "lengths"  # all that TorchRec takes of no samples
        if _trains(setup, batch):
            ours, theirs = bed.step(batch), plain(batch.tensor()).values()
            theirs.backward(gradient(theirs))
        else:
            ours, theirs = bed.look_up(batch), plain(batch.tensor()).values()
        assert _all(torch.equal(ours, theirs.detach()))
        mine, other = _weights(bed.model), _weights(plain)
        assert _all(all(same_bits(mine[name], other[name]) for name in mine))
        seen[0] += 1

    run()
    return seen[0]


def _fuzz_all() -> dict[str, int]:
    return {name: _fuzz(name) for name in SETUPS} | {"beside": _fuzz_beside_plain_tables()}


def test_two_ranks(tmp_path: Path):
    for seen in run_ranks(2, tmp_path, _fuzz_all):
        assert len(seen) == len(SETUPS) + 1
        assert all(cases > 0.9 * CASES for cases in seen.values())
