"""HotSketch: which ids matter most, in a few bytes per hot row (CAFE, SIGMOD 2024, section 3.2).

Shape legend: N occurrences, S virtual shards, W buckets a shard, H hot rows a shard, T tables.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor

#: Slots of a bucket.
SLOTS = 4
#: ``hot_rows`` of a slot that holds no key.
FREE = -2
#: ``hot_rows`` of a slot whose key owns no hot row.
COLD = -1
#: ``owners`` of a hot row that no slot owns.
NO_OWNER = -1
#: What :func:`rebalance` says to do to a hot row: nothing, copy its new owner's shared row, clear.
ACTION_KEEP, ACTION_COPY, ACTION_CLEAR = 0, 1, 2
#: Columns of ``counters``.
COUNTERS = ("non_finite", "skipped", "replaced", "promoted", "demoted")


@dataclass(frozen=True)
class SketchState:
    """All that a sketch knows, as tensors whose first axis is the virtual shard.

    Attributes:
        keys: int64 ``[S, W, 4]``; any value is a key, see ``hot_rows``.
        scores: float32 ``[S, W, 4]``, >= 0, times ``inflation``.
        hot_rows: int32 ``[S, W, 4]``: :data:`FREE`, :data:`COLD`, or the hot row of the shard that
            the key owns.
        owners: int32 ``[S, H]``: the slot of the shard that owns the row, or :data:`NO_OWNER`.
        norms: float64 ``[S, T, 2]``: running sum and count of the importance of each table.
        inflation: float64 ``[S]``: what an occurrence counts now.
        counters: int64 ``[S, 5]``, the columns of :data:`COUNTERS`.
        steps: int64 ``[S]``: how many batches were observed.
    """

    keys: Tensor
    scores: Tensor
    hot_rows: Tensor
    owners: Tensor
    norms: Tensor
    inflation: Tensor
    counters: Tensor
    steps: Tensor

    @classmethod
    def empty(
        cls,
        *,
        shards: int,
        buckets: int,
        hot_rows: int,
        tables: int,
        device: torch.device | None = None,
    ) -> SketchState:
        """A sketch that has seen nothing.

        Args:
            shards: virtual shards to hold, >= 0.
            buckets: buckets of each shard, >= 1.
            hot_rows: hot rows of each shard, >= 1.
            tables: tables whose importance is normalised, >= 0; 0 takes importance as it is.
            device: where the tensors live.

        Raises:
            ValueError: if a size is out of range.
        """
        sizes = {"shards": (shards, 0), "buckets": (buckets, 1), "hot_rows": (hot_rows, 1)}
        for name, (size, least) in (sizes | {"tables": (tables, 0)}).items():
            if size < least:
                raise ValueError(f"SketchState.empty: `{name}` must be >= {least}, got {size}")
        slots = (shards, buckets, SLOTS)
        return cls(
            keys=torch.zeros(slots, dtype=torch.int64, device=device),
            scores=torch.zeros(slots, dtype=torch.float32, device=device),
            hot_rows=torch.full(slots, FREE, dtype=torch.int32, device=device),
            owners=torch.full((shards, hot_rows), NO_OWNER, dtype=torch.int32, device=device),
            norms=torch.zeros((shards, tables, 2), dtype=torch.float64, device=device),
            inflation=torch.ones(shards, dtype=torch.float64, device=device),
            counters=torch.zeros((shards, len(COUNTERS)), dtype=torch.int64, device=device),
            steps=torch.zeros(shards, dtype=torch.int64, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def check(self, op: str) -> None:
        """Check that the tensors fit each other.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if a shape is wrong or the devices differ.
        """
        shards, buckets = self.keys.shape[0], self.keys.shape[1]
        slots = (shards, buckets, SLOTS)
        check_tensor(op, "keys", self.keys, torch.int64, slots)
        check_tensor(op, "scores", self.scores, torch.float32, slots)
        check_tensor(op, "hot_rows", self.hot_rows, torch.int32, slots)
        check_tensor(op, "owners", self.owners, torch.int32, (shards, None))
        check_tensor(op, "norms", self.norms, torch.float64, (shards, None, 2))
        check_tensor(op, "inflation", self.inflation, torch.float64, (shards,))
        check_tensor(op, "counters", self.counters, torch.int64, (shards, len(COUNTERS)))
        check_tensor(op, "steps", self.steps, torch.int64, (shards,))
        check_same_device(op, **self.tensors())


def observe(
    state: SketchState,
    keys: Tensor,
    shards: Tensor,
    importance: Tensor,
    *,
    growth: float = 1.0,
    norm_decay: float = 1.0,
) -> None:
    r"""Add the importance of each occurrence to the sketch.

    A held key adds to its score. A newcomer takes a free slot of its bucket; in a full bucket it
    replaces the smallest key without a hot row and inherits its score (SpaceSaving), so that
    ``true count <= score <= true count + inherited`` while nothing decays. A bucket full of hot
    keys skips the newcomer: rows change hands only in :func:`rebalance`.

    Args:
        state: the sketch, mutated.
        keys: int64 ``[N]``; the bits above 48 are the table where ``state`` normalises tables.
        shards: int32 ``[N]``, in [0, S), or -1: not tracked.
        importance: float32 ``[N]``, >= 0. What is not finite or negative is counted and skipped.
        growth: >= 1; what was learned before counts ``1 / growth`` of what is learned now.
        norm_decay: in (0, 1]; weight that the running mean keeps from step to step.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, or the devices differ.

    Note:
        Deterministic for any number of threads: shards are independent, and within a shard
        occurrences are applied in the order given. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.2; decay by inflation: CAFE+ (TOIS 2025), section 3.
    """
    state.check("observe")
    check_tensor("observe", "keys", keys, torch.int64, (None,))
    check_tensor("observe", "shards", shards, torch.int32, tuple(keys.shape))
    check_tensor("observe", "importance", importance, torch.float32, tuple(keys.shape))
    check_same_device("observe", keys=keys, shards=shards, state=state.keys, scores=importance)
    if not 1 <= growth <= 2**60:
        raise ValueError(f"observe: `growth` must be in [1, 2**60], got {growth}")
    if not 0 < norm_decay <= 1:
        raise ValueError(f"observe: `norm_decay` must be in (0, 1], got {norm_decay}")
    torch.ops.torchrec_cafe.observe(
        keys,
        shards,
        importance,
        state.keys,
        state.scores,
        state.hot_rows,
        state.norms,
        state.inflation,
        state.counters,
        growth,
        norm_decay,
    )
    state.steps.add_(1)


def rebalance(
    state: SketchState, selected: Tensor, *, min_score: float = 0.0, hysteresis: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Give the hot rows of some shards to their highest scores.

    The threshold of a shard is its H-th highest score (or ``min_score``, if that is higher). Hot
    keys below ``(1 - hysteresis) * threshold`` lose their row; free rows go to the highest scores
    at or above the threshold.

    Args:
        state: the sketch; its ``hot_rows``, ``owners`` and ``counters`` are mutated.
        selected: int64 ``[n]``, ascending shards in [0, S).
        min_score: >= 0, in average occurrences; no key below it earns a row.
        hysteresis: in [0, 1).

    Returns:
        ``actions`` int8 ``[n, H]``: what to do to each hot row of the selected shards
        (:data:`ACTION_KEEP`, :data:`ACTION_COPY`, :data:`ACTION_CLEAR`); and ``new_keys`` int64
        ``[n, H]``: the key that a row to copy now belongs to.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, or the devices differ.

    Note:
        Deterministic: ties go to the lower slot. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.3; automatic threshold: CAFE+ (TOIS 2025), section 3.
    """
    state.check("rebalance")
    check_tensor("rebalance", "selected", selected, torch.int64, (None,))
    check_same_device("rebalance", selected=selected, state=state.keys)
    if not min_score >= 0:
        raise ValueError(f"rebalance: `min_score` must be >= 0, got {min_score}")
    if not 0 <= hysteresis < 1:
        raise ValueError(f"rebalance: `hysteresis` must be in [0, 1), got {hysteresis}")
    return torch.ops.torchrec_cafe.rebalance(
        selected,
        state.keys,
        state.scores,
        state.hot_rows,
        state.owners,
        state.inflation,
        state.counters,
        min_score,
        hysteresis,
    )


@torch.library.register_fake("torchrec_cafe::observe")
def _(*_args: object) -> None:
    return None


@torch.library.register_fake("torchrec_cafe::rebalance")
def _(  # noqa: PLR0913  the schema has as many arguments
    selected: Tensor,
    sketch_keys: Tensor,
    sketch_scores: Tensor,
    sketch_hot_rows: Tensor,
    owners: Tensor,
    inflation: Tensor,
    counters: Tensor,
    min_score: float,
    hysteresis: float,
) -> tuple[Tensor, Tensor]:
    shape = (selected.shape[0], owners.shape[1])
    actions = torch.empty(shape, dtype=torch.int8, device=selected.device)
    return actions, torch.empty(shape, dtype=torch.int64, device=selected.device)
