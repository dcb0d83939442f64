"""HotSketch: which ids matter most, in a few bytes per hot row (CAFE, SIGMOD 2024, section 3.2).

Shape legend: N occurrences, S virtual shards, W buckets a shard, H hot rows a shard.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error
from torchrec_cafe.ops.huge_pages import advise_huge_pages

#: Slots of a bucket.
SLOTS = 4
#: ``hot_rows`` of a slot that holds no key.
FREE = -2
#: ``hot_rows`` of a slot whose key owns no hot row.
COLD = -1
#: ``hot_rows`` of a slot whose key owns no hot row either, but looks up two shared ones.
MEDIUM = -3
#: ``owners`` of a hot row that no slot owns.
NO_OWNER = -1
#: What a newcomer to a full bucket takes off the smallest cold score, as a part of its own score.
WEAR = 0.25
#: What :func:`rebalance` says to do to a hot row: nothing, copy its new owner's shared row, clear,
#: add up its new owner's two rows.
ACTION_KEEP, ACTION_COPY, ACTION_CLEAR, ACTION_ADD = 0, 1, 2, 3
#: Columns of ``counters``.
COUNTERS = ("non_finite", "skipped", "replaced", "promoted", "demoted", "steps")

# int64 words of a bucket: one cache line, read and written in one access.
_WORDS = 2 * SLOTS


@dataclass(frozen=True)
class SketchState:
    """All that a sketch knows, as tensors whose first axis is the virtual shard.

    Attributes:
        buckets: int64 ``[S, W, 8]``: a bucket is one cache line of four keys, four float32 scores
            and four int32 hot rows; see :attr:`keys`, :attr:`scores`, :attr:`hot_rows`.
        owners: int32 ``[S, H]``: the slot of the shard that owns the row, or :data:`NO_OWNER`.
        inflation: float64 ``[S]``: what an occurrence counts now.
        counters: int64 ``[S, 6]``, the columns of :data:`COUNTERS`.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or the devices differ.
    """

    buckets: Tensor
    owners: Tensor
    inflation: Tensor
    counters: Tensor

    def __post_init__(self) -> None:
        """Check that the tensors fit each other; see the class."""
        check_tensor("SketchState", "buckets", self.buckets, torch.int64, (None, None, _WORDS))
        shards, buckets = self.buckets.shape[:2]
        if buckets == 0:
            raise ValueError("SketchState: `buckets` must have at least one bucket a shard, got 0")
        check_tensor("SketchState", "owners", self.owners, torch.int32, (shards, None))
        check_tensor("SketchState", "inflation", self.inflation, torch.float64, (shards,))
        check_tensor("SketchState", "counters", self.counters, torch.int64, (shards, len(COUNTERS)))
        check_same_device("SketchState", **self.tensors())

    @classmethod
    def empty(
        cls, *, shards: int, buckets: int, hot_rows: int, device: torch.device | None = None
    ) -> SketchState:
        """A sketch that has seen nothing.

        Args:
            shards: virtual shards to hold, >= 0.
            buckets: buckets of each shard, >= 1.
            hot_rows: hot rows of each shard, >= 1.
            device: where the tensors live.

        Raises:
            ValueError: if a size is out of range.
        """
        sizes = {"shards": (shards, 0), "buckets": (buckets, 1), "hot_rows": (hot_rows, 1)}
        for name, (size, least) in sizes.items():
            if size < least:
                raise ValueError(f"SketchState.empty: `{name}` must be >= {least}, got {size}")
        slots = torch.empty((shards, buckets, _WORDS), dtype=torch.int64, device=device)
        if slots.is_cpu:
            advise_huge_pages(slots)
        state = cls(
            buckets=slots.zero_(),
            owners=torch.full((shards, hot_rows), NO_OWNER, dtype=torch.int32, device=device),
            inflation=torch.ones(shards, dtype=torch.float64, device=device),
            counters=torch.zeros((shards, len(COUNTERS)), dtype=torch.int64, device=device),
        )
        state.hot_rows.fill_(FREE)
        return state

    @property
    def keys(self) -> Tensor:
        """int64 ``[S, W, 4]``, a view; any value is a key, see :attr:`hot_rows`."""
        return self.buckets[..., :SLOTS]

    @property
    def scores(self) -> Tensor:
        """float32 ``[S, W, 4]``, a view: finite, >= 0, times ``inflation``."""
        return self.buckets.view(torch.float32)[..., 2 * SLOTS : 3 * SLOTS]

    @property
    def hot_rows(self) -> Tensor:
        """int32 ``[S, W, 4]``, a view.

        :data:`FREE`, :data:`COLD`, :data:`MEDIUM`, or the hot row of the shard that the key owns.
        """
        return self.buckets.view(torch.int32)[..., 3 * SLOTS :]

    @property
    def steps(self) -> Tensor:
        """int64 ``[S]``, a view: how many batches were observed."""
        return self.counters[:, COUNTERS.index("steps")]

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def observe(
    state: SketchState, keys: Tensor, shards: Tensor, importance: Tensor, *, growth: float = 1.0
) -> None:
    r"""Add the importance of each occurrence to the sketch.

    A held key adds to its score, and a newcomer takes a free slot of its bucket. In a full bucket
    it takes :data:`WEAR` of its score off the smallest key without a hot row, and that key's slot
    if that had less. A bucket full of hot keys skips the newcomer: rows change hands only
    in :func:`rebalance`. While nothing decays, a score never exceeds the key's true sum.

    Args:
        state: the sketch, mutated.
        keys: int64 ``[N]``, any value; N < 2**31.
        shards: int32 ``[N]``, in [0, S), or -1: not tracked.
        importance: float32 ``[N]``, >= 0. What is not finite or negative is counted and skipped.
        growth: in [1, 2**60]; what was learned before counts ``1 / growth`` of what is learned now.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, or the devices differ; the state is
            untouched then. On CUDA a shard out of range cannot be seen without waiting for the
            device, and counts as not tracked.

    Note:
        Deterministic for any number of threads and on every device: buckets are independent, and
        within a bucket occurrences are applied in the order given. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.2, with the ostracism of Elastic Sketch (SIGCOMM 2018)
    in place of SpaceSaving, see ``docs/hot_sketch.md``; decay by inflation: CAFE+ (TOIS 2025),
    section 3.
    """
    if not 1 <= growth <= 2**60:
        raise ValueError(f"observe: `growth` must be in [1, 2**60], got {growth}")
    try:
        torch.ops.torchrec_cafe.observe.default(
            keys, shards, importance, state.buckets, state.inflation, state.counters, growth
        )
    except RuntimeError as error:
        check_tensor("observe", "keys", keys, torch.int64, (None,))
        check_tensor("observe", "shards", shards, torch.int32, tuple(keys.shape))
        check_tensor("observe", "importance", importance, torch.float32, tuple(keys.shape))
        check_same_device(
            "observe", keys=keys, shards=shards, importance=importance, state=state.buckets
        )
        raise value_error("observe", error) from None


def rebalance(
    state: SketchState,
    selected: Tensor,
    *,
    min_score: float = 0.0,
    hysteresis: float = 0.0,
    num_medium: int = 0,
) -> tuple[Tensor, Tensor]:
    """Give the hot rows of some shards to their highest scores.

    The threshold of a shard is its H-th highest score (or ``min_score``, if that is higher). Hot
    keys below ``(1 - hysteresis) * threshold`` lose their row; free rows go to the highest scores
    at or above the threshold. Then keys without a row become medium at or above the score of rank
    ``H + num_medium`` (0 if the shard holds no more keys than that), and stop being it below
    ``(1 - hysteresis)`` of that score.

    Args:
        state: the sketch; its ``hot_rows``, ``owners`` and ``counters`` are mutated.
        selected: int64 ``[n]``, ascending shards in [0, S).
        min_score: >= 0, in average occurrences; no key below it earns a row.
        hysteresis: in [0, 1).
        num_medium: >= 0, about how many keys of a shard are to be medium; 0 leaves all as they are.

    Returns:
        ``actions`` int8 ``[n, H]``: what to do to each hot row of the selected shards
        (:data:`ACTION_KEEP`, :data:`ACTION_COPY`, :data:`ACTION_CLEAR`, :data:`ACTION_ADD`); and
        ``new_keys`` int64 ``[n, H]``: the key that a row to copy or add up now belongs to.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, or the devices differ; the state is
            untouched then. On CUDA a shard out of range, or out of order, cannot be seen without
            waiting for the device, and is left alone.

    Note:
        Deterministic: ties go to the lower slot. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.3; automatic threshold: CAFE+ (TOIS 2025), section 3;
    medium keys: CAFE, section 3.4, with the threshold of CAFE+.
    """
    if not min_score >= 0:
        raise ValueError(f"rebalance: `min_score` must be >= 0, got {min_score}")
    if not 0 <= hysteresis < 1:
        raise ValueError(f"rebalance: `hysteresis` must be in [0, 1), got {hysteresis}")
    if num_medium < 0:
        raise ValueError(f"rebalance: `num_medium` must be >= 0, got {num_medium}")
    try:
        return torch.ops.torchrec_cafe.rebalance.default(
            selected,
            state.buckets,
            state.owners,
            state.inflation,
            state.counters,
            min_score,
            hysteresis,
            num_medium,
        )
    except RuntimeError as error:
        check_tensor("rebalance", "selected", selected, torch.int64, (None,))
        check_same_device("rebalance", selected=selected, state=state.buckets)
        raise value_error("rebalance", error) from None


# A meta tensor among others takes a call here: it must not be a silent nothing.
@torch.library.register_fake("torchrec_cafe::observe")
def _(  # noqa: PLR0913  the schema has as many arguments
    keys: Tensor,
    shards: Tensor,
    importance: Tensor,
    buckets: Tensor,
    inflation: Tensor,
    counters: Tensor,
    growth: float,
) -> None:
    tensors = {"keys": keys, "shards": shards, "importance": importance}
    check_same_device("observe", **tensors, state=buckets)


@torch.library.register_fake("torchrec_cafe::rebalance")
def _(  # noqa: PLR0913  the schema has as many arguments
    selected: Tensor,
    buckets: Tensor,
    owners: Tensor,
    inflation: Tensor,
    counters: Tensor,
    min_score: float,
    hysteresis: float,
    num_medium: int,
) -> tuple[Tensor, Tensor]:
    check_same_device("rebalance", selected=selected, state=buckets)
    shape = (selected.shape[0], owners.shape[1])
    actions = torch.empty(shape, dtype=torch.int8, device=selected.device)
    return actions, torch.empty(shape, dtype=torch.int64, device=selected.device)
