"""The pool of hot rows that the tables of a group share, and the sketch that hands them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_cafe.config import Cafe
from torchrec_cafe.ops import (
    ACTION_CLEAR,
    ACTION_COPY,
    COLD,
    COUNTERS,
    FREE,
    HotRows,
    SketchState,
    observe,
    rebalance,
    shared_rows_of,
)

# Weight that the running mean of a table's importance keeps from step to step: it follows the
# training within some hundred steps and averages over enough occurrences even in a rare table.
NORM_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class PoolLayout:
    """Where a rank's part of a pool lies.

    Attributes:
        kind: the tables' kind.
        num_shards: virtual shards over all ranks.
        first_shard: first virtual shard of this rank.
        shards_held: virtual shards of this rank, >= 0.
        hot_rows_per_shard: hot rows of a virtual shard.
        buckets_per_shard: buckets of a virtual shard.
        hot_offset: physical row of this rank's first hot row.
    """

    kind: Cafe
    num_shards: int
    first_shard: int
    shards_held: int
    hot_rows_per_shard: int
    buckets_per_shard: int
    hot_offset: int


class HotRowPool(nn.Module):
    """Decides which ids own a row, and moves the rows.

    Learning is split in two so that no update is lost. :meth:`learn` runs in backward, before
    FBGEMM has updated the rows, and only feeds the sketch. :meth:`settle` runs before the next
    lookup, when the step's update is in the rows: it re-assigns hot rows and copies to each new
    owner the very row that it was trained on, with its optimizer state.

    Args:
        layout: where the rank's part of the pool lies.
        tables: int64 ``[T, 5]``, rows of the ``tables`` argument of
            :func:`torchrec_cafe.ops.remap`, one per tracked table, in the order of ``index``.
    """

    tables: Tensor

    def __init__(self, layout: PoolLayout, tables: Tensor) -> None:
        """Allocate an empty sketch on the device of ``tables``; see the class."""
        super().__init__()
        self.layout = layout
        self.register_buffer("tables", tables, persistent=False)
        state = SketchState.empty(
            shards=layout.shards_held,
            buckets=layout.buckets_per_shard,
            hot_rows=layout.hot_rows_per_shard,
            tables=tables.shape[0],
            device=tables.device,
        )
        for name, tensor in state.tensors().items():
            self.register_buffer(f"sketch_{name}", tensor, persistent=False)
        self._state_names = tuple(state.tensors())
        self._step = 0  # host copy of sketch_steps: reading the tensor would synchronise
        self._unsettled = False

    @property
    def sketch(self) -> SketchState:
        """The sketch's tensors, not copied."""
        return SketchState(**{n: self.get_buffer(f"sketch_{n}") for n in self._state_names})

    def hot_rows(self) -> HotRows:
        """Where a lookup finds the ids that own a row."""
        return HotRows(
            keys=self.get_buffer("sketch_keys"),
            hot_rows=self.get_buffer("sketch_hot_rows"),
            first_shard=self.layout.first_shard,
            num_shards=self.layout.num_shards,
            rows_per_shard=self.layout.hot_rows_per_shard,
            offset=self.layout.hot_offset,
        )

    def reload(self) -> None:
        """Take over what a checkpoint has written into the sketch's tensors."""
        steps = self.sketch.steps
        self._step = int(steps[0]) if steps.numel() else 0
        self._unsettled = False

    def learn(self, keys: Tensor, shards: Tensor, importance: Tensor) -> None:
        """Feed the sketch; see :func:`torchrec_cafe.ops.observe` for the arguments."""
        observe(
            self.sketch,
            keys,
            shards,
            importance,
            growth=self.layout.kind.growth,
            norm_decay=NORM_DECAY,
        )
        self._step += 1
        self._unsettled = True

    def settle(self, rows: list[Tensor]) -> None:
        """Re-assign the hot rows of the shards whose turn it is, once per step learned.

        Args:
            rows: physical table and optimizer states, first axis physical rows; mutated.
        """
        if not self._unsettled:
            return
        self._unsettled = False
        layout = self.layout
        interval = layout.kind.rebalance_interval
        # By global number, so that the schedule does not depend on the number of ranks.
        first = (self._step - layout.first_shard) % interval
        last = max(first, layout.shards_held)
        selected = torch.arange(first, last, interval, device=self.tables.device)
        if selected.numel() == 0:
            return
        actions, new_keys = rebalance(
            self.sketch,
            selected,
            min_score=layout.kind.threshold or 0.0,
            hysteresis=layout.kind.hysteresis,
        )
        first_rows = layout.hot_offset + selected * layout.hot_rows_per_shard
        hot_rows = first_rows[:, None] + torch.arange(actions.shape[1], device=actions.device)
        copied = actions == ACTION_COPY
        to, source = hot_rows[copied], shared_rows_of(new_keys[copied], self.tables)
        cleared = hot_rows[actions == ACTION_CLEAR]
        with torch.no_grad():
            for tensor in rows:
                tensor[to] = tensor[source]
                tensor[cleared] = 0

    def statistics(self) -> dict[str, float]:
        """What the sketch has done so far, for logs and TensorBoard.

        Returns:
            Per counter of :data:`torchrec_cafe.ops.COUNTERS` its total on this rank; the share of
            slots and of hot rows in use (``occupancy``, ``hot_occupancy``, in [0, 1]); and
            ``threshold``, the mean lowest score of a hot row, in average occurrences.
        """
        sketch = self.sketch
        totals = dict(zip(COUNTERS, sketch.counters.sum(0).tolist(), strict=True))
        hot = sketch.hot_rows > COLD
        lowest = torch.where(hot, sketch.scores, torch.inf).flatten(1).amin(1)
        lowest = (lowest.double() / sketch.inflation)[lowest.isfinite()]
        return totals | {
            "occupancy": (sketch.hot_rows != FREE).double().mean().item(),
            "hot_occupancy": (sketch.owners >= 0).double().mean().item(),
            "threshold": lowest.mean().item() if lowest.numel() else 0.0,
        }
