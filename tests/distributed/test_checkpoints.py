"""Checkpoints of all kinds of tables load on any number of ranks, sharded in any way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.distributed import checkpoint_tasks as tasks
from tests.distributed.ranks import run_ranks

# Many processes, or many cases: on a busy machine they take long.
pytestmark = pytest.mark.timeout(900)

#: sharding type, ranks, hosts
LAYOUTS = [
    ("row_wise", 1, 1),
    ("row_wise", 2, 1),
    ("row_wise", 3, 1),
    ("row_wise", 4, 1),
    ("table_wise", 2, 1),
    ("table_wise", 4, 1),
    ("table_row_wise", 2, 1),
    ("table_row_wise", 4, 2),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """Of the checkpoint of a layout (first) in a layout (second); the diagonal was never saved."""
    where = tmp_path_factory.mktemp("checkpoints")
    folders = [str(where / f"{number}") for number in range(len(LAYOUTS))]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    # Starting ranks takes longer than what they do: each layout loads all earlier ones' checkpoints
    # where it saves its own, and those of the later ones afterwards.
    for number, (sharding_type, ranks, hosts) in enumerate(LAYOUTS):
        (own, others), *_ = run_ranks(
            ranks,
            where / f"save {number}",
            tasks.save_then_load,
            folders[number],
            sharding_type,
            folders[:number],
            num_hosts=hosts,
        )
        found[number, number] = own
        found |= {(first, number): outcome for first, outcome in enumerate(others)}
    for number, (sharding_type, ranks, hosts) in enumerate(LAYOUTS):
        later, *_ = run_ranks(
            ranks,
            where / f"load {number}",
            tasks.load,
            folders[number:],
            sharding_type,
            num_hosts=hosts,
        )
        # The first is the layout's own checkpoint, in new processes.
        found[number, -1] = later[0]
        found |= {(number + n, number): later[n] for n in range(1, len(later))}
    return found


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations(range(len(LAYOUTS)), 2)))
def test_any_layout_loads_into_any_other(outcomes: Any, saved: int, loaded: int):
    expected, got = outcomes[saved, saved], outcomes[saved, loaded]
    assert got["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        assert torch.equal(got["state"][name], tensor), name
    torch.testing.assert_close(got["predictions"], expected["predictions"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_the_same_layout_goes_on_to_the_last_bit(outcomes: Any, layout: int):
    expected, got = outcomes[layout, layout], outcomes[layout, -1]
    for name, tensor in expected["state"].items():
        assert torch.equal(got["state"][name], tensor), name
    assert torch.equal(got["predictions"], expected["predictions"])
    assert got["losses"] == expected["losses"]
