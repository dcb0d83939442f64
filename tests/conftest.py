"""Shared fixtures: a GPU where a test asks for one, random state that does not leak."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU; where one is promised, let them fail instead."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        if os.environ.get("CAFE_REQUIRE_CUDA") == "1":
            pytest.fail("CAFE_REQUIRE_CUDA=1, but torch finds no GPU")
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _restore_random_state() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
