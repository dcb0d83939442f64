"""What the host code of the CUDA kernels does, and what malformed input does not do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.simt.build import ROOT, sanitizer_environment
from tests.simt.device import Simt, simulated
from torchrec_cafe import ops
from torchrec_cafe.ops import SketchState

TABLES = torch.tensor([[3000, 16, 0, 0, 0], [900, 9, 0, 16, 1]])
POOL = ops.PoolRows(offset=57, hot_rows_per_shard=4, second_rows_per_shard=2)
IDS = torch.arange(0, 800, 2)
OFFSETS = torch.arange(0, 401, 4)
BITS = ops.BloomBits(first_shard=0, shards_held=16, per_shard=20, num_hashes=3)
ONE_BIT = ops.BloomBits(first_shard=0, shards_held=16, per_shard=20, num_hashes=1)
#: Wrappers say what is wrong with an argument, or pass on what the operator says.
ERRORS = (RuntimeError, ValueError)


@pytest.fixture
def device() -> Simt:
    device = simulated()
    device.set_schedule("in_order")
    return device


def state() -> SketchState:
    torch.manual_seed(0)
    state = SketchState.empty(shards=16, buckets=4, hot_rows=4)
    ops.observe(state, IDS, (IDS % 16).int(), torch.rand(len(IDS)))
    return state


def hot_rows(pool: ops.PoolRows = POOL) -> ops.HotRows:
    return ops.HotRows(buckets=state().buckets, first_shard=0, num_shards=16, rows=pool)


def remap(offsets: torch.Tensor = OFFSETS) -> ops.Remapped:
    return ops.remap(IDS, offsets, TABLES, hot_rows())


def learn(*, scaled: bool = False) -> None:
    shards = (IDS % 16).int()
    batch = ops.Remapped(IDS, OFFSETS, IDS.int(), IDS, shards, IDS.int(), shards)
    norms = torch.zeros((16, 2, 2), dtype=torch.float64)
    given = state(), norms, torch.ones((len(OFFSETS) - 1, 8)), OFFSETS, batch
    options: dict[str, Any] = {"features": torch.tensor([0, 1]), "decay": 0.9, "growth": 2.0}
    if not scaled:
        ops.learn(*given, **options)
        return
    found = ops.Lookups(IDS % 50, OFFSETS, torch.arange(len(IDS)).int())
    taught = (IDS % 17 - 1).int()
    ops.learn_scaled(*given, ops.ScaledRows(torch.ones((50, 8)), found, taught, 32, 3), **options)


def move_rows() -> None:
    moves = ops.Moves(torch.tensor([3]), *ops.rebalance(state(), torch.tensor([3])))
    ops.move_rows(torch.zeros(57 + 16 * 6, 8), moves, TABLES, POOL, second_factor=0.5)


def factor_gradients(offsets: torch.Tensor = OFFSETS) -> None:
    found = ops.Lookups(IDS % 50, offsets, torch.arange(len(IDS)).int())
    grad = torch.ones((len(offsets) - 1, 8))
    features = torch.tensor([0, -1])
    ops.factor_gradients(
        *(grad, torch.ones((50, 8)), found, IDS, (IDS % 17 - 1).int()),
        features=features,
        given=torch.ones(len(IDS)),
        shape=(16, 32),
        num_hashes=3,
    )


def bloom(name: str, offsets: torch.Tensor = OFFSETS) -> None:
    rows, weights = torch.ones((320, 8)), torch.ones((16, 20))
    grad = torch.ones((len(offsets) - 1, 8))
    given = {
        "bloom_weigh": (weights, IDS, offsets, TABLES, BITS),
        "bloom_pool": (rows, weights, IDS, offsets, TABLES),
        "bloom_weigh_backward": (grad, rows, IDS, offsets, TABLES),
    }[name]
    options = {} if name == "bloom_weigh" else {"row_bits": BITS, "weight_bits": BITS}
    getattr(ops, name)(*given, **options)


def mix_ids() -> None:
    sizes = torch.tensor([900])
    ops.mix_ids(IDS, torch.tensor([0, len(IDS)]), sizes, torch.zeros(1, dtype=torch.int64))


#: What a training step calls.
STEP: dict[str, Callable[[], object]] = {
    "mix_ids": mix_ids,
    "remap": remap,
    "observe": lambda: ops.observe(state(), IDS, (IDS % 16).int(), torch.ones(len(IDS))),
    "learn": learn,
    "learn_scaled": partial(learn, scaled=True),
    "rebalance": lambda: ops.rebalance(state(), torch.tensor([3]), num_medium=2),
    "move_rows": move_rows,
    "quotient_remainder": lambda: ops.quotient_remainder(IDS, OFFSETS, TABLES),
    "bloom_rows of one hash": lambda: ops.bloom_rows(IDS, OFFSETS, TABLES, ONE_BIT),
    "bloom_weigh": partial(bloom, "bloom_weigh"),
    "bloom_pool": partial(bloom, "bloom_pool"),
    "bloom_weigh_backward": partial(bloom, "bloom_weigh_backward"),
    "key_factors": lambda: ops.key_factors(
        torch.ones((16, 32)), IDS, (IDS % 17 - 1).int(), num_hashes=3
    ),
    "key_factors of rows": lambda: ops.key_factors(
        torch.ones((16, 32)), IDS, (IDS % 17 - 1).int(), IDS.int() % len(IDS), num_hashes=3
    ),
    "factor_gradients": factor_gradients,
}
#: What waits for the device: the number of its rows is in the ids.
WAITING: dict[str, Callable[[], object]] = {
    "add_second_rows": lambda: ops.add_second_rows(remap(), POOL),
    "bloom_rows": lambda: ops.bloom_rows(IDS, OFFSETS, TABLES, BITS),
    "bloom_union": lambda: ops.bloom_union(IDS, OFFSETS, TABLES, BITS, of="rows"),
}


@pytest.mark.parametrize("name", STEP)
def test_a_step_can_be_captured_into_a_graph(device: Simt, name):
    with device.capturing():
        device.run(STEP[name])


@pytest.mark.parametrize("name", WAITING)
def test_what_has_as_many_rows_as_the_ids_say_waits_for_the_device(device: Simt, name):
    with device.capturing(), pytest.raises(ERRORS, match="the host waits while a graph"):
        device.run(WAITING[name])
    device.run(WAITING[name])


@pytest.mark.parametrize("name", STEP | WAITING)
def test_a_launch_that_fails_is_an_error(device: Simt, name):
    run = (STEP | WAITING)[name]
    device.fail_launch(-1)
    device.run(run)
    for number in range(device.launches()):
        device.fail_launch(number)
        with pytest.raises(ERRORS, match="this launch was told to fail"):
            device.run(run)
    device.fail_launch(-1)


@pytest.mark.parametrize(
    "offsets",
    [
        torch.tensor([0, len(IDS), 0, len(IDS), 0]),
        OFFSETS.flip(0),
        OFFSETS - 100,
        OFFSETS + 2**40,
        OFFSETS * 3,
        torch.randint(-(2**62), 2**62, (21,), generator=torch.Generator().manual_seed(0)),
    ],
    ids=["twice", "descending", "below_0", "far_beyond", "beyond", "random"],
)
def test_offsets_that_cannot_be_touch_nothing_else(device: Simt, offsets):
    """The sanitizers say so, in the run below."""

    def run() -> None:
        ops.add_second_rows(remap(offsets), POOL)
        ops.quotient_remainder(IDS, offsets, TABLES)
        ops.bloom_rows(IDS, offsets, TABLES, ONE_BIT)
        factor_gradients(offsets)
        for name in ("bloom_weigh", "bloom_pool", "bloom_weigh_backward"):
            bloom(name, offsets)

    device.set_schedule("random")
    with device.unordered_writes():
        device.run(run)


@pytest.mark.timeout(1200)  # most of it for the compiler
def test_sanitizers_find_nothing():
    """The same tests under the address and undefined-behaviour sanitizers, one schedule each."""
    if "CAFE_SIMT" in os.environ:
        pytest.skip("this is that run")
    tests = ["tests/ops/test_cuda.py", "tests/simt/test_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "random or touch"]
    done = subprocess.run(
        [*command, *tests],
        env=sanitizer_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout
