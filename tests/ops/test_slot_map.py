"""The slots of a scratchpad: operators against their definition, and what a map must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import SlotMapState, reference
from torchrec_cafe.ops.slot_map import DIRTY, HOLD, _empty_map


def small_state(num_slots: int, capacity: int) -> SlotMapState:
    """A state whose map has to grow soon."""
    entries, queue, counters = _empty_map(capacity)
    counters[1] = num_slots
    empty = SlotMapState.empty(num_slots)
    return replace(empty, entries=entries, queue=queue, counters=counters)


def tensors_of(state: SlotMapState) -> list[Tensor]:
    """A copy of all of a state. Of the queue, what is in it: the rest was never written."""
    head, tail = state.counters[2:].tolist()
    queue = state.queue[torch.arange(head, tail) % len(state.queue)]
    others = [getattr(state, f.name) for f in fields(state) if f.name != "queue"]
    return [tensor.clone() for tensor in (queue, *others)]


def assert_unchanged(state: SlotMapState, before: list[Tensor]) -> None:
    for now, then in zip(tensors_of(state), before, strict=True):
        assert torch.equal(now, then)


@dataclass(eq=False)
class Batch:
    number: int
    rows: Tensor
    found: Tensor | None = None


class Pair:
    """A slot map and its definition, which do the same; `seen` counts what has happened."""

    def __init__(self, num_slots: int, num_rows: int, capacity: int) -> None:
        self.state = small_state(num_slots, capacity)
        self.expected = reference.SlotMap(num_slots)
        self.num_rows = num_rows
        self.next_number = 0
        self.waiting: list[Batch] = []
        self.planned: list[Batch] = []
        self.trained: dict[int, bool] = {}  # rows in slots: by a batch since they were filled?
        self.seen: Counter[str] = Counter()

    def step(self, random: Random) -> None:
        """Do one of what a mover does, at random."""
        actions = [self.announce, self.plan, self.plan, self.plan]
        actions += [self.release, self.release, self.postpone, self.retract]
        action = random.choice(actions)
        if len(self.waiting) > 6:
            action = random.choice([self.plan, self.retract])
        before = int(self.state.counters[3]), len(self.state.queue)
        action(random)
        grown = len(self.state.queue) > before[1]
        self.seen["map grew"] += grown
        self.seen["queue was compacted"] += not grown and int(self.state.counters[3]) < before[0]
        self.check()

    def announce(self, random: Random) -> None:
        size = random.randint(0, 2 * len(self.state.slots))
        keys = torch.tensor([random.randrange(self.num_rows) for _ in range(size)]).long()
        self.next_number += random.choice([1, 1, 1, 1, 5, 20])
        got = ops.announce_rows(keys, self.state, self.next_number)
        expected = self.expected.announce(keys, self.next_number)
        assert torch.equal(got.rows, expected.rows)
        assert torch.equal(got.positions, expected.positions)
        assert torch.equal(got.rows[got.positions.long()], keys)
        self.waiting.append(Batch(self.next_number, got.rows))

    def plan(self, random: Random) -> None:
        if not self.waiting:
            return
        in_turn = random.random() < 0.8
        batch = self.waiting[0] if in_turn else random.choice(self.waiting)
        live = min(batch.number for batch in (*self.waiting, *self.planned))
        options = {
            "oldest": max(0, live - random.choice([0, 0, 0, 1, 10])),
            "urgent": random.random() < 0.4,
            "train": random.random() < 0.6,
        }
        before, slots = tensors_of(self.state), list(self.expected.slots)
        got = ops.plan_slots(batch.rows, self.state, **options)
        expected = self.expected.plan(batch.rows, **options)
        assert got.shortage == expected.shortage
        for name in ("fill_rows", "fill_slots", "spill_rows", "spill_slots"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
        if got.shortage > 0:
            self.seen["shortage"] += 1
            self.seen["shortage of an urgent batch"] += options["urgent"]
            assert_unchanged(self.state, before)
            return
        assert torch.equal(got.found, expected.found)
        self.check_moves(got, {row for row in slots if row is not None})
        self.trained.update((row, True) for row in batch.rows.tolist() if options["train"])
        batch.found = got.found
        self.waiting.remove(batch)
        self.planned.append(batch)

    def check_moves(self, plan: ops.SlotPlan, before: set[int]) -> None:
        """Rows are spilled if, and only if, a batch may have changed them since their fill."""
        after = {row for row in self.expected.slots if row is not None}
        fills, spills = plan.fill_rows.tolist(), plan.spill_rows.tolist()
        assert after - before == set(fills) - before
        left = before - after
        assert {row for row in left if self.trained[row]} == set(spills)
        assert len(spills) == len(set(spills))
        rows = self.expected.rows
        self.seen["needed row left"] += any(row in rows and rows[row].pending for row in left)
        self.seen["spill"] += len(spills)
        self.seen["clean row left"] += len(left) - len(spills)
        self.trained = {row: self.trained.get(row, False) for row in after}

    def release(self, random: Random) -> None:
        if self.planned:
            batch = self.planned.pop(0 if random.random() < 0.7 else -1)
            assert batch.found is not None
            ops.release_slots(batch.found, self.state)
            self.expected.release(batch.found)

    def postpone(self, random: Random) -> None:
        if self.planned:
            batch = self.planned.pop()
            assert batch.found is not None
            ops.postpone_rows(batch.rows, batch.found, self.state)
            self.expected.postpone(batch.rows, batch.found)
            self.waiting = sorted([*self.waiting, batch], key=lambda waiting: waiting.number)
            self.seen["postponed"] += 1

    def retract(self, random: Random) -> None:
        if self.waiting:
            batch = self.waiting.pop(random.randrange(len(self.waiting)))
            ops.retract_rows(batch.rows, self.state)
            self.expected.retract(batch.rows)
            self.seen["retracted"] += 1

    def check(self) -> None:
        rows, states = self.state.slots.unbind(1)
        num_free = int(self.state.counters[1])
        for batch in self.planned:
            assert torch.equal(rows[batch.found], batch.rows)
            assert (states[batch.found] >= HOLD).all()
        in_slots = rows[rows >= 0].tolist()
        assert len(in_slots) == len(set(in_slots)) == len(rows) - num_free
        free = self.state.free[:num_free].tolist()
        assert len(set(free)) == num_free
        assert (rows[free] == -1).all()
        assert free == self.expected.free
        assert rows.tolist() == [-1 if row is None else row for row in self.expected.slots]
        expected = [hold * HOLD for hold in self.expected.holds]
        for slot in self.expected.dirty:
            expected[slot] += DIRTY
        assert states.tolist() == expected
        known = self.state.entries[:, 0]
        assert sorted(known[known >= 0].tolist()) == sorted(self.expected.rows)
        assert int(self.state.counters[0]) == len(self.expected.rows)


@given(
    num_slots=st.integers(1, 8),
    num_rows=st.integers(1, 24),
    capacity=st.sampled_from([4, 7, 64]),
    steps=st.integers(1, 60),
    random=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_order_of_calls_matches_reference(num_slots, num_rows, capacity, steps, random):
    pair = Pair(num_slots, num_rows, capacity)
    for _ in range(steps):
        pair.step(random)


@pytest.mark.parametrize("seed", range(4))
def test_a_long_run_matches_reference_and_meets_every_case(seed):
    pair = Pair(num_slots=5 + seed, num_rows=16, capacity=4)
    random = Random(seed)
    for _ in range(3):
        # The uses of rows that never leave fill the queue.
        for num_rows, steps in ((16, 300), (3, 300)):
            pair.num_rows = num_rows
            for _ in range(steps):
                pair.step(random)
    cases = {"shortage", "shortage of an urgent batch", "needed row left", "spill"}
    cases |= {"clean row left", "postponed", "retracted", "map grew", "queue was compacted"}
    assert {case for case, count in pair.seen.items() if count > 0} == cases


def test_a_large_batch_in_a_map_that_grows_matches_reference():
    pair = Pair(num_slots=3000, num_rows=4000, capacity=4)
    random = Random(0)
    for _ in range(12):
        pair.announce(random)
        pair.plan(random)
        pair.check()
    assert pair.seen["map grew"] == 0  # counted by steps only
    assert len(pair.state.entries) > 4000


def announced(state: SlotMapState, keys: list[int], number: int) -> Tensor:
    return ops.announce_rows(torch.tensor(keys), state, number).rows


def plan(state: SlotMapState, rows: Tensor, **options) -> ops.SlotPlan:
    return ops.plan_slots(rows, state, **{"oldest": 0, "urgent": False, "train": True} | options)


def test_who_leaves_is_decided_by_the_next_use_and_then_by_the_last():
    state = SlotMapState.empty(4)
    first = announced(state, [10, 11, 12, 13], 0)
    ops.release_slots(plan(state, first).found, state)
    announced(state, [12], 1)
    announced(state, [11], 2)
    last = announced(state, [20, 21], 3)
    unused = plan(state, last, oldest=1)
    assert unused.spill_rows.tolist() == [10, 13]
    ops.postpone_rows(last, unused.found, state)
    more = announced(state, [30, 31, 32], 4)
    assert plan(state, more, oldest=1).shortage == 3
    needed = plan(state, more, oldest=1, urgent=True)
    # 20 and 21 are needed in batch 3, 11 in 2 and 12 in 1.
    assert needed.spill_rows.tolist() == [21, 20, 11]  # 21 has the lower slot
    assert state.slots[:, 0].sort().values.tolist() == [12, 30, 31, 32]


def test_the_number_of_a_live_batch_too_high_takes_no_slot_from_it():
    state = SlotMapState.empty(2)
    held = announced(state, [1, 2], 0)
    plan(state, held)
    announced(state, [3], 1)
    rows = announced(state, [4], 2)
    before = tensors_of(state)
    assert plan(state, rows, oldest=100).shortage == 1
    assert_unchanged(state, before)
    state = SlotMapState.empty(2)
    announced(state, [1], 0)  # has no slot that could be taken
    ops.release_slots(plan(state, announced(state, [8, 9], 1)).found, state)
    rows = announced(state, [4], 2)
    before = tensors_of(state)
    assert plan(state, rows, oldest=100).shortage == 1
    assert_unchanged(state, before)


def test_opcheck():
    operators = torch.ops.torchrec_cafe
    state = SlotMapState.empty(3)
    row_map = lambda: (state.entries, state.queue, state.counters)  # noqa: E731
    slot_map = lambda: (*row_map(), state.slots, state.free)  # noqa: E731
    state.queue.zero_()  # places that were never written differ between copies
    torch.library.opcheck(operators.announce_rows, (torch.tensor([3, 1, 3]), *row_map(), 0))
    rows = announced(state, [3, 1, 3], 0)
    # Operators that mutate and return a number are not for AOTAutograd.
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    args = rows, *slot_map(), 0, False, True
    torch.library.opcheck(operators.plan_slots, args, test_utils=tests)
    torch.library.opcheck(operators.retract_rows, (rows, *row_map()))
    held = plan(state, rows).found
    torch.library.opcheck(operators.release_slots, (held, state.slots))
    torch.library.opcheck(operators.postpone_rows, (rows, held, *slot_map()))
    new_entries, new_queue, new_counters = _empty_map(100)
    new = new_entries, new_queue.zero_(), new_counters
    torch.library.opcheck(operators.grow_slot_map, (*row_map(), *new))


def refuses(kind: type[Exception], message: str, call: Callable[[SlotMapState], object]) -> None:
    """Rows 1 and 2 lie in slots 0 and 1 and are held, 5 and 6 are announced; slot 2 is free."""
    state = SlotMapState.empty(3)
    plan(state, announced(state, [1, 2], 0))
    announced(state, [5, 6], 1)
    before = tensors_of(state)
    with pytest.raises(kind, match=message):
        call(state)
    assert_unchanged(state, before)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("keys", "number", "kind", "message"),
    [
        (ints(5), 9, TypeError, "`keys` must be torch.int64, got torch.int32"),
        (torch.ones(1, 2).long(), 9, ValueError, r"`keys` must have shape \[any\], got \[1, 2\]"),
        (torch.arange(4)[::2], 9, ValueError, "`keys` must be contiguous"),
        (torch.tensor([7, -1]), 9, ValueError, "`keys` must be >= 0, got -1"),
        (torch.tensor([5]), -1, ValueError, r"`number` must be in \[0, 2\*\*31 - 1\)"),
        (torch.tensor([5]), 2**31 - 1, ValueError, r"`number` must be in \[0, 2\*\*31 - 1\)"),
        (torch.tensor([5]), 1, ValueError, "`number` must be above 1, that of .* before, got 1"),
    ],
)
def test_announcing_names_the_argument_and_changes_nothing(keys, number, kind, message):
    refuses(kind, f"announce_rows: {message}", lambda s: ops.announce_rows(keys, s, number))


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (ints(5), TypeError, "must be torch.int64, got torch.int32"),
        (torch.ones(1, 2).long(), ValueError, r"must have shape \[any\], got \[1, 2\]"),
        (torch.tensor([5, 1]), ValueError, "must have been announced and not planned, got 1"),
        (torch.tensor([5, 9]), ValueError, "must have been announced and not planned, got 9"),
        (torch.tensor([5, -1]), ValueError, "must have been announced and not planned, got -1"),
    ],
)
def test_planning_and_retracting_name_the_argument_and_change_nothing(rows, kind, message):
    refuses(kind, f"plan_slots: `rows` {message}", lambda s: plan(s, rows))
    refuses(kind, f"plan_slots: `rows` {message}", lambda s: plan(s, rows, urgent=True))
    refuses(kind, f"retract_rows: `rows` {message}", lambda s: ops.retract_rows(rows, s))


@pytest.mark.parametrize(
    ("held", "kind", "message"),
    [
        (torch.tensor([0, 1]), TypeError, "must be torch.int32, got torch.int64"),
        (ints(1, 2), ValueError, "must be slots that are held, got 2"),
        (ints(0, -1), ValueError, "must be slots that are held, got -1"),
        (ints(0, 3), ValueError, "must be slots that are held, got 3"),
        (ints(1, 1), ValueError, "must be slots that are held, got 1"),
    ],
)
def test_releasing_and_postponing_name_the_argument_and_change_nothing(held, kind, message):
    refuses(kind, f"release_slots: `held` {message}", lambda s: ops.release_slots(held, s))
    rows = torch.tensor([1, 2])
    refuses(kind, f"postpone_rows: `held` {message}", lambda s: ops.postpone_rows(rows, held, s))


def test_postponing_tells_which_rows_lie_elsewhere():
    rows = torch.tensor([2, 1])
    for wrong, kind, message in (
        (rows, ValueError, "`rows` must lie in the slots, got 2"),
        (rows.int(), TypeError, "`rows` must be torch.int64, got torch.int32"),
        (rows[:1], ValueError, r"`held` must have shape \[1\], got \[2\]"),
    ):
        call = partial(ops.postpone_rows, wrong, ints(0, 1))
        refuses(kind, f"postpone_rows: {message}", call)
