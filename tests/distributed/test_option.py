"""The search for options that fit: against all choices there are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cafe.distributed import BudgetError
from torchrec_cafe.distributed.option import TableOption, cheapest


def option(cost: float, device: int, host: int = 0) -> TableOption:
    return TableOption(
        kind=None,
        sharding_type="table_wise",
        compute_kernel="fused",
        load_factor=None,
        device_bytes=device,
        host_bytes=host,
        largest_shard=device,
        largest_on_host=host,
        milliseconds=cost,
        risk=0.0,
        cost=cost,
    )


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 120),
)
@settings(max_examples=300, deadline=None)
def test_a_choice_fits_if_any_does_and_is_nearly_the_cheapest(tables: Any, limit: int):
    options = [[option(float(cost), size) for cost, size in of] for of in tables]
    best = min(
        (
            sum(o.cost for o in choice)
            for choice in itertools.product(*options)
            if sum(o.device_bytes for o in choice) <= limit
        ),
        default=None,
    )
    if best is None:
        with pytest.raises(BudgetError) as error:
            cheapest(options, limit, 0)
        least = sum(min(o.device_bytes for o in of) for of in options)
        assert error.value.device_missing == least - limit
        return
    chosen = [of[i] for of, i in zip(options, cheapest(options, limit, 0), strict=True)]
    assert sum(o.device_bytes for o in chosen) <= limit
    # A greedy choice is off by no more than one table.
    spread = max(max(o.cost for o in of) - min(o.cost for o in of) for of in options)
    assert best <= sum(o.cost for o in chosen) <= best + 2 * spread


def test_host_memory_is_a_limit_too():
    exact_or_not = [option(0, 100), option(1, 10, host=100), option(5, 10)]
    chosen = cheapest([exact_or_not] * 3, 30, 200)
    assert sorted(chosen) == [1, 1, 2]
    # What the first table has taken of the host must be given back for the second.
    first = [option(0, 100), option(1, 10, host=100), option(5, 20)]
    second = [option(0, 100), option(2, 10, host=100)]
    assert cheapest([first, second], 40, 100) == [2, 1]


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 50), st.integers(1, 40), st.integers(0, 40)),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 100),
    st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_what_is_chosen_fits_both_memories(tables: Any, device: int, host: int):
    """A greedy search may miss a choice of two memories, but never makes one that does not fit."""
    options = [[option(float(cost), size, on_host) for cost, size, on_host in of] for of in tables]
    fitting = [
        choice
        for choice in itertools.product(*options)
        if sum(o.device_bytes for o in choice) <= device
        and sum(o.host_bytes for o in choice) <= host
    ]
    try:
        chosen = [of[i] for of, i in zip(options, cheapest(options, device, host), strict=True)]
    except BudgetError:
        return
    assert sum(o.device_bytes for o in chosen) <= device
    assert sum(o.host_bytes for o in chosen) <= host
    assert sum(o.cost for o in chosen) >= min(sum(o.cost for o in choice) for choice in fitting)
