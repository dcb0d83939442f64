"""HotSketch: the operators against their definition, and the properties that define a sketch."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import SketchState, reference

SHARDS, BUCKETS, HOT_ROWS = 3, 2, 3
# Every int64 is an ordinary key, also those that other sketches take for an empty slot.
KEYS = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 21, -1, 2**63 - 1, -(2**63)])
OCCURRENCES = st.lists(
    st.tuples(
        KEYS,
        st.integers(-1, SHARDS - 1),
        st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 100.0, float("nan"), float("inf"), -1.0]),
    ),
    max_size=40,
)


def empty(shards: int = SHARDS) -> SketchState:
    return SketchState.empty(shards=shards, buckets=BUCKETS, hot_rows=HOT_ROWS)


def clone(state: SketchState) -> SketchState:
    return SketchState(**{name: tensor.clone() for name, tensor in state.tensors().items()})


def assert_equal(left: SketchState, right: SketchState) -> None:
    for name, tensor in left.tensors().items():
        assert torch.equal(tensor, right.tensors()[name]), name


def batch(occurrences: list[tuple[int, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.tensor([key for key, _, _ in occurrences], dtype=torch.int64)
    shards = torch.tensor([shard for _, shard, _ in occurrences], dtype=torch.int32)
    return keys, shards, torch.tensor([x for _, _, x in occurrences], dtype=torch.float32)


def assert_consistent(state: SketchState) -> None:
    """Every hot row has at most one owner, and owners and slots agree."""
    for shard in range(state.keys.shape[0]):
        hot_rows = state.hot_rows[shard].flatten().tolist()
        owned = {row: slot for slot, row in enumerate(hot_rows) if row >= 0}
        assert len(owned) == sum(row >= 0 for row in hot_rows)
        assert owned == {
            row: slot for row, slot in enumerate(state.owners[shard].tolist()) if slot >= 0
        }


@given(
    batches=st.lists(OCCURRENCES, max_size=4),
    growth=st.sampled_from([1.0, 1.5, 2.0**40]),
    medium=st.integers(0, 4),
)
@settings(max_examples=80, deadline=None)
def test_observe_and_rebalance_match_reference(batches, growth, medium):
    native, plain = empty(), empty()
    for number, occurrences in enumerate(batches):
        ops.observe(native, *batch(occurrences), growth=growth)
        reference.observe(plain, *batch(occurrences), growth=growth)
        assert_equal(native, plain)
        selected = torch.arange(number % 2, SHARDS, 2)
        options = {"min_score": 0.5 * (number % 3), "hysteresis": 0.25, "num_medium": medium}
        got = ops.rebalance(native, selected, **options)
        expected = reference.rebalance(plain, selected, **options)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert_equal(native, plain)
        assert_consistent(native)


def follow(occurrences: list[tuple[int, int, float]]) -> tuple[SketchState, dict[str, float]]:
    """The state after the occurrences, and what became of the importance they brought."""
    state = empty()
    fate = dict.fromkeys(("observed", "added", "worn", "lost", "skipped"), 0.0)
    for key, shard, x in occurrences:
        if shard < 0 or not 0 <= x < float("inf"):
            continue
        before = state.scores.double().sum().item()
        outcome = reference.insert(state, shard, key, x)
        change = state.scores.double().sum().item() - before
        fate["observed"] += x
        fate["skipped"] += x * (outcome == "skipped")
        if outcome in ("hit", "inserted"):
            assert change == x
        elif outcome == "worn":
            assert change == -ops.WEAR * x
            fate["lost"] += x
            fate["worn"] += ops.WEAR * x
        elif outcome == "replaced":
            assert change >= x - ops.WEAR * x  # what it replaces was no more than that
            fate["worn"] += x - change
    return state, fate


@given(occurrences=OCCURRENCES)
@settings(max_examples=60, deadline=None)
def test_mass_is_conserved(occurrences):
    """Scores hold what was observed, less what newcomers to full buckets lost and wore off."""
    followed, fate = follow(occurrences)
    state = empty()
    ops.observe(state, *batch(occurrences))
    assert torch.equal(state.buckets, followed.buckets)
    assert state.counters[:, 1].sum() == fate["skipped"] == 0  # nothing is hot yet
    held = state.scores.double().sum().item()
    assert held == fate["observed"] - fate["lost"] - fate["worn"]


@given(occurrences=OCCURRENCES)
@settings(max_examples=60, deadline=None)
def test_truth_bounds_estimate(occurrences):
    """``true - given away <= score <= true``: a score is never above the truth."""
    _, fate = follow(occurrences)
    state = empty()
    keys, shards, importance = batch(occurrences)
    ops.observe(state, keys, shards, importance)
    valid = importance.isfinite() & (importance >= 0)
    for shard in range(SHARDS):
        for key in set(keys.tolist()):
            place = reference.find(state.buckets, shard, key)
            if place is not None:
                true = importance[valid & (shards == shard) & (keys == key)].sum()
                score = state.scores[shard][place]
                assert true - fate["lost"] - fate["worn"] <= score <= true


@given(occurrences=OCCURRENCES)
@settings(max_examples=40, deadline=None)
def test_union_of_shards_equals_whole(occurrences):
    """A shard's state depends on its own occurrences only, so that shards can move."""
    whole = empty()
    keys, shards, importance = batch(occurrences)
    ops.observe(whole, keys, shards, importance)
    for shard in range(SHARDS):
        part = empty(shards=1)
        mine = torch.where(shards == shard, 0, -1).int()
        ops.observe(part, keys, mine, importance)
        for name, tensor in part.tensors().items():
            assert torch.equal(tensor[0], whole.tensors()[name][shard]), name


def test_result_does_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 500, (20_000,), generator=generator)
    shards = (keys % 65 - 1).int()
    importance = torch.rand(20_000, generator=generator)
    states, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            state = SketchState.empty(shards=64, buckets=2, hot_rows=2)
            for _ in range(3):
                ops.observe(state, keys, shards, importance)
                ops.rebalance(state, torch.arange(64))
            states.append(state)
    finally:
        torch.set_num_threads(threads)
    assert_equal(states[0], states[1])
    assert_equal(states[0], states[2])


_DIGEST = """
import hashlib, torch
from torchrec_cafe import ops
generator = torch.Generator().manual_seed(0)
state = ops.SketchState.empty(shards=16, buckets=8, hot_rows=20)
tables = torch.tensor([[3000, 40, 0, 0, 0], [9, 9, 0, 40, -1]])
pool = ops.PoolRows(offset=49, hot_rows_per_shard=20, second_rows_per_shard=4)
hot = ops.HotRows(buckets=state.buckets, first_shard=0, num_shards=16, rows=pool)
digest = hashlib.sha256()
for _ in range(6):
    ids = torch.randint(0, 9, (4000,), generator=generator)
    ids[:2000] = (torch.rand(2000, generator=generator) ** 3 * 3000).long()
    remapped = ops.remap(ids, torch.arange(4001), tables, hot)
    ops.observe(
        state, remapped.keys, remapped.shards, torch.rand(4000, generator=generator), growth=1.1
    )
    ops.rebalance(state, torch.arange(16), hysteresis=0.1, num_medium=6)
    lookups = ops.add_second_rows(remapped, pool)
    bits = ops.BloomBits(first_shard=0, shards_held=16, per_shard=20, num_hashes=3)
    shards = torch.tensor([[3000, 16, 0, 0, 0], [9, 16, 0, 0, 1]])
    table = torch.rand((16, 20), generator=generator)
    batch = ids, torch.arange(4001), shards
    token_rows = torch.rand((16 * 20, 24), generator=generator)
    bloom = *ops.bloom_rows(*batch, bits), ops.bloom_weigh(table, *batch, bits)
    for rows in (token_rows, token_rows.half()):
        bloom += (ops.bloom_pool(rows, table, *batch, row_bits=bits, weight_bits=bits),)
    for tensor in (*remapped, *lookups, *bloom, *state.tensors().values()):
        digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def test_result_does_not_depend_on_the_instruction_set():
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env=os.environ | {"CAFE_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for capability in ("default", "avx2", "avx512")
    }
    assert len(digests) == 1


def test_a_saved_sketch_goes_on_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def learn(state: SketchState) -> None:
        keys = (torch.rand(5000, generator=generator) ** 3 * 400).long()
        shards, importance = (keys % 4 - 1).int(), torch.rand(5000, generator=generator)
        ops.observe(state, keys, shards, importance, growth=1.5)
        ops.rebalance(state, torch.arange(SHARDS), hysteresis=0.1)

    state = empty()
    for _ in range(5):
        learn(state)
    torch.save(state.tensors(), tmp_path / "sketch.pt")
    loaded = SketchState(**torch.load(tmp_path / "sketch.pt"))
    assert_equal(state, loaded)
    before = generator.get_state()
    learn(state)
    generator.set_state(before)
    learn(loaded)
    assert_equal(state, loaded)


def test_hot_rows_go_to_highest_scores():
    state = SketchState.empty(shards=1, buckets=8, hot_rows=4)
    keys = torch.arange(16)
    ops.observe(state, keys, torch.zeros(16, dtype=torch.int32), 1.0 + keys.float())
    ops.rebalance(state, torch.tensor([0]))
    owners = state.owners[0]
    assert sorted(state.keys.flatten()[owners.long()].tolist()) == [12, 13, 14, 15]


def test_hysteresis_keeps_the_border_still():
    state = SketchState.empty(shards=1, buckets=4, hot_rows=1)
    zeros = torch.zeros(2, dtype=torch.int32)
    ops.observe(state, torch.tensor([1, 2]), zeros, torch.tensor([10.0, 9.0]))
    ops.rebalance(state, torch.tensor([0]), hysteresis=0.2)
    ops.observe(state, torch.tensor([1, 2]), zeros, torch.tensor([0.0, 2.0]))  # now 10 and 11
    actions, _ = ops.rebalance(state, torch.tensor([0]), hysteresis=0.2)
    assert actions.tolist() == [[ops.ACTION_KEEP]]
    ops.observe(state, torch.tensor([1, 2]), zeros, torch.tensor([0.0, 9.0]))  # now 10 and 20
    actions, new_keys = ops.rebalance(state, torch.tensor([0]), hysteresis=0.2)
    assert actions.tolist() == [[ops.ACTION_COPY]]
    assert new_keys.tolist() == [[2]]


def test_renormalisation_keeps_order_and_scale():
    state, steady = empty(shards=1), empty(shards=1)
    zeros = torch.zeros(3, dtype=torch.int32)
    keys, importance = torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 4.0])
    for _ in range(100):
        ops.observe(state, keys, zeros, importance, growth=2.0)
        ops.observe(steady, keys, zeros, importance)
    assert state.inflation.item() <= 2.0**60
    assert state.scores.isfinite().all()
    held = state.scores[0].flatten() / state.inflation.float()
    # A geometric series: an occurrence now counts 1, one n steps ago 2**-n.
    assert torch.allclose(held.sort().values[-3:], torch.tensor([2.0, 4.0, 8.0]))
    order = state.scores.flatten().argsort(), steady.scores.flatten().argsort()
    assert order[0].tolist()[-3:] == order[1].tolist()[-3:]


def test_frequent_keys_are_held_as_often_as_the_paper_says():
    """CAFE, theorem 1: a key of share g is held with Pr > 1 - (1 - g) / ((c - 1) g w)."""
    buckets, slots, trials = 64, ops.SLOTS, 60
    share = 0.05
    bound = 1 - (1 - share) / ((slots - 1) * share * buckets)
    generator = torch.Generator().manual_seed(1)
    held = 0
    for trial in range(trials):
        state = SketchState.empty(shards=1, buckets=buckets, hot_rows=1)
        stream = torch.randint(10, 100_000, (4000,), generator=generator) + trial * 1_000_000
        stream[torch.rand(4000, generator=generator) < share] = trial
        shards = torch.zeros(4000, dtype=torch.int32)
        ops.observe(state, stream, shards, torch.ones(4000))
        held += reference.find(state.buckets, 0, trial) is not None
    # Three standard deviations of a binomial below the bound.
    slack = 3 * (bound * (1 - bound) / trials) ** 0.5
    assert held / trials >= bound - slack


def test_opcheck():
    state = empty()
    keys, shards, importance = batch([(1, 0, 1.0), (2, 1, 2.0), (1, 0, 0.5)])
    torch.library.opcheck(torch.ops.torchrec_cafe.advise_huge_pages, (state.buckets,))
    torch.library.opcheck(
        torch.ops.torchrec_cafe.observe,
        (
            *(keys, shards, importance),
            *(state.buckets, state.inflation, state.counters, 1.5),
        ),
    )
    ops.observe(state, keys, shards, importance)
    torch.library.opcheck(
        torch.ops.torchrec_cafe.rebalance,
        (
            *(torch.tensor([0, 2]), state.buckets),
            *(state.owners, state.inflation, state.counters, 0.0, 0.1, 2),
        ),
    )


GOOD = batch([(1, 0, 1.0), (2, 1, 2.0)])


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "`keys` must be torch.int64", {"keys": GOOD[0].int()}),
        (TypeError, "`shards` must be torch.int32", {"shards": GOOD[1].long()}),
        (TypeError, "`importance` must be torch.float32", {"importance": GOOD[2].double()}),
        (ValueError, r"`importance` must have shape \[2\], got \[1\]", {"importance": GOOD[2][:1]}),
        (ValueError, r"`keys` must have shape \[any\]", {"keys": GOOD[0].view(1, 2)}),
        (ValueError, r"`growth` must be in \[1, 2\*\*60\], got 0.5", {"growth": 0.5}),
        (ValueError, r"observe: `shards` must be in \[-1, 3\), got 7", {"shards": GOOD[1] + 7}),
        (ValueError, r"`shards` must be in \[-1, 3\), got -2", {"shards": GOOD[1] - 2}),
    ],
)
def test_observe_refuses_and_leaves_the_state(error, message, change):
    state = empty()
    before = clone(state)
    arguments = dict(zip(("keys", "shards", "importance"), GOOD, strict=True)) | change
    with pytest.raises(error, match=message):
        ops.observe(state, **arguments)
    assert_equal(state, before)


def test_tensors_of_several_devices_are_refused():
    state = empty()
    keys, shards, importance = GOOD
    with pytest.raises(ValueError, match="one device, got `keys` on meta, `shards` on cpu"):
        ops.observe(state, keys.to("meta"), shards, importance)
    with pytest.raises(ValueError, match="one device, got `selected` on meta, `state` on cpu"):
        ops.rebalance(state, torch.tensor([0], device="meta"))


def test_rebalance_and_state_refuse():
    state = empty()
    with pytest.raises(ValueError, match=r"`hysteresis` must be in \[0, 1\), got 1"):
        ops.rebalance(state, torch.tensor([0]), hysteresis=1)
    with pytest.raises(ValueError, match="`min_score` must be >= 0, got -1"):
        ops.rebalance(state, torch.tensor([0]), min_score=-1)
    with pytest.raises(ValueError, match="`num_medium` must be >= 0, got -1"):
        ops.rebalance(state, torch.tensor([0]), num_medium=-1)
    with pytest.raises(ValueError, match=r"rebalance: `selected` must be in \[0, 3\)"):
        ops.rebalance(state, torch.tensor([3]))
    with pytest.raises(ValueError, match="`selected` must ascend"):
        ops.rebalance(state, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="`hot_rows` must be >= 1, got 0"):
        SketchState.empty(shards=1, buckets=1, hot_rows=0)
    with pytest.raises(ValueError, match=r"`owners` must have shape \[3, any\]"):
        dataclasses.replace(state, owners=state.owners[:1].contiguous())
    with pytest.raises(TypeError, match="`buckets` must be torch.int64"):
        dataclasses.replace(state, buckets=state.buckets.int())
    with pytest.raises(ValueError, match="at least one bucket a shard, got 0"):
        dataclasses.replace(state, buckets=state.buckets[:, :0].contiguous())


def test_buckets_that_are_not_cache_lines_are_refused():
    state = empty()
    words = torch.empty(state.buckets.numel() + 1, dtype=torch.int64)
    moved = words[1:].view_as(state.buckets).copy_(state.buckets)
    with pytest.raises(ValueError, match="`buckets` must begin at a multiple of 64 bytes; clone"):
        ops.observe(dataclasses.replace(state, buckets=moved), *GOOD)
    assert torch.equal(moved, state.buckets)
