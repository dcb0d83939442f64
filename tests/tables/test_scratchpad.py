"""What a scratchpad does at its limits."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from tests.tables.test_lookahead import (
    OPTIMIZERS,
    ROWS,
    SAMPLES,
    TABLES,
    BrokenStore,
    Pair,
    SlowStore,
    bags_of,
    distinct,
    trace,
    window,
)
from torchrec_cafe.tables import ScratchpadFullError


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_with_more_rows_than_slots_is_looked_up_table_by_table(optimizer):
    batches = trace("random", 60)
    pair = Pair(window(batches, 0) * 2 // 3, optimizer)
    pair.run(batches, 2)
    assert pair.bags.statistics.critical_misses > 0


def test_a_table_with_more_rows_than_slots_is_refused_with_the_numbers():
    small, large = (
        trace("same", 8),
        bags_of(torch.full((TABLES * SAMPLES,), 5), torch.arange(5 * TABLES * SAMPLES)),
    )
    pair = Pair(window(small, 0))
    assert pair.tbe_slots < 5 * SAMPLES
    pair.run(small[:4], 1)
    numbers = rf"{distinct([large])} distinct rows, and the scratchpad has {pair.tbe_slots} slots"
    with pytest.raises(ScratchpadFullError, match=numbers):
        pair.bags(*large)
    with pytest.raises(ScratchpadFullError, match="cache_fraction"), torch.no_grad():
        pair.bags(*large)
    pair.run(small[4:], 1)  # nothing was harmed


def test_slots_of_a_graph_are_kept_until_its_backward_is_done():
    first, second = trace("new", 2)
    pair = Pair(max(distinct([first]), distinct([second])) + 1)
    ours, theirs = pair.bags(*first), pair.whole(*first)
    with pytest.raises(ScratchpadFullError, match="looked up and not yet updated"):
        pair.bags(*second)
    ours.sum().backward()
    theirs.sum().backward()
    pair.step(second)
    pair.compare()


def test_slots_of_a_graph_that_is_gone_are_let_go():
    batches = trace("new", 20)
    pair = Pair(window(batches, 0))
    for batch in batches:
        pair.bags(*batch)
        gc.collect()


def test_a_second_backward_is_refused():
    batch = trace("zipf", 1)[0]
    pair = Pair(window([batch], 0))
    looked_up = pair.bags(*batch)
    looked_up.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once only"):
        looked_up.sum().backward()


def test_batches_that_are_left_out_give_their_slots_back():
    batches = trace("new", 40)
    pair = Pair(window(batches, 2))
    for number in range(0, 40, 2):  # every other batch is looked ahead for and never looked up
        for coming in batches[number : number + 3]:
            pair.bags.look_ahead(*coming)
        pair.step(batches[number])
    pair.compare()
    assert pair.bags.statistics.batches == 20


def test_ids_that_change_after_they_were_looked_ahead_for_are_looked_up_as_they_are():
    batches = trace("zipf", 4)
    pair = Pair(ROWS)
    for batch in batches:
        pair.bags.look_ahead(*batch)
        batch[0].copy_((batch[0] * 7 + 3) % ROWS)
        pair.step(batch)
    pair.compare()


def test_an_error_of_the_store_is_raised_where_rows_are_waited_for():
    batches = trace("new", 6)
    pair = Pair(window(batches, 1), store=BrokenStore)
    pair.run(batches[:3], 1)
    pair.store.fails = True
    with pytest.raises(OSError, match="the disk is gone"):
        pair.bags(*batches[3])
    with pytest.raises(OSError, match="the disk is gone"):
        pair.bags(*batches[4])


def test_the_thread_ends_with_its_tables():
    batch = trace("zipf", 1)[0]
    pair = Pair(window([batch], 0))
    pair.step(batch)
    mover = next(t for t in threading.enumerate() if t.name.startswith("look-ahead of tables 't0'"))
    gone = weakref.ref(pair.bags)
    del pair
    gc.collect()
    mover.join(timeout=10)
    assert gone() is None
    assert not mover.is_alive()


def test_two_runs_are_equal_to_the_last_bit():
    batches = trace("zipf", 40)
    weights = []
    for _ in range(2):
        pair = Pair(window(batches, 3))
        pair.run(batches, 3)
        weights.append(torch.cat(pair.tbe.split_embedding_weights()).clone())
    assert torch.equal(*weights)


def test_updates_of_split_batches_are_written_back():
    batches = trace("random", 12)
    pair = Pair(window(batches, 0) * 2 // 3)
    for batch in batches:
        assert distinct([batch]) > pair.tbe_slots
        pair.step(batch)
        pair.compare()  # flushes, and has the rows read anew


def test_nothing_moves_while_the_store_is_in_other_hands():
    batches = trace("new", 30)
    pair = Pair(window(batches, 2))
    for number, batch in enumerate(batches[:-3]):
        for coming in batches[number : number + 4]:  # one more than fits
            pair.bags.look_ahead(*coming)
        pair.step(batch)
        pair.bags.flush()
        before = [tensor.clone() for tensor in pair.store.tensors]
        time.sleep(0.002)
        for tensor, then in zip(pair.store.tensors, before, strict=True):
            assert torch.equal(tensor, then)
            tensor.mul_(0.9)
        for table in range(TABLES):
            pair.whole.split_embedding_weights()[table].mul_(0.9)
            pair.whole.split_optimizer_states()[table][0].mul_(0.9)
    pair.compare()


def test_errors_leave_no_slot_behind():
    batches = trace("new", 8)
    pair = Pair(window(batches, 0))
    for batch in batches:
        # FBGEMM has no CPU kernel for inference mode, in whole tables neither.
        with torch.inference_mode(), pytest.raises(NotImplementedError):
            pair.bags(batch[0].clone(), batch[1].clone())
        with pytest.raises(IndexError):
            pair.bags(*batch, torch.ones(1))
        pair.step(batch)
    pair.compare()


def test_look_ahead_catches_up_without_being_asked():
    batches = trace("new", 9)
    pair = Pair(ROWS * TABLES, store=SlowStore)
    for batch in batches:
        pair.bags.look_ahead(*batch)
    deadline = time.monotonic() + 10
    while pair.bags.statistics.fills < distinct(batches) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pair.bags.statistics.fills == distinct(batches)


def test_other_bags_of_the_same_ids_are_other_bags():
    ids, offsets = trace("zipf", 1)[0]
    pair = Pair(ROWS)
    pair.bags.look_ahead(ids, offsets)
    shifted = offsets.clone()
    shifted[1:-1] = shifted[2:].clone()
    pair.step((ids, shifted))
    pair.compare()
