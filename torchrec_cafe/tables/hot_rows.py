"""The pool of hot rows that the tables of a group share, and the sketch that hands them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchrec_cafe.config import Cafe
from torchrec_cafe.ops import (
    COLD,
    COUNTERS,
    FREE,
    ID_BITS,
    MEDIUM,
    HotRows,
    Moves,
    PoolRows,
    Remapped,
    ScaledRows,
    SketchState,
    learn,
    learn_scaled,
    move_rows,
    observe,
    rebalance,
)
from torchrec_cafe.tables.state import ShardedState
from torchrec_cafe.tables.touched import TouchedRows

# Weight that the running mean of a table's importance keeps from step to step: it follows the
# training within some hundred steps and averages over enough occurrences even in a rare table.
NORM_DECAY = 0.99
# Most steps between two turns of settling. Each turn costs a few calls whatever there is to do, so
# some steps have none, and the others more shards.
TURN_STEPS = 4
# Steps between two looks at the share of lookups that are hot.
HOT_SHARE_INTERVAL = 16


@dataclass(frozen=True, kw_only=True)
class PoolLayout:
    """Where a rank's part of a pool lies.

    Attributes:
        kind: the tables' kind.
        num_shards: virtual shards over all ranks.
        first_shard: first virtual shard of this rank.
        shards_held: virtual shards of this rank, >= 0.
        buckets_per_shard: buckets of a virtual shard.
        rows: where this rank's hot and second rows lie.
        num_medium: about how many ids of a virtual shard have a second row.
    """

    kind: Cafe
    num_shards: int
    first_shard: int
    shards_held: int
    buckets_per_shard: int
    rows: PoolRows
    num_medium: int = 0


class _Clock:
    """How far a pool is: apart from it, for a module takes long to set an attribute.

    Attributes:
        steps: learned from; a host copy of the sketch's, for reading the tensor would synchronise.
        unsettled: whether a turn of settling is due.
        samples: of the last batch.
        growth: what an occurrence counts more after so many samples.
    """

    __slots__ = ("growth", "samples", "steps", "unsettled")

    def __init__(self) -> None:
        """Begin."""
        self.steps = 0
        self.unsettled = False
        self.samples = -1
        self.growth = 1.0


class HotRowPool(nn.Module, ShardedState):
    """Decides which ids own a row, and moves the rows.

    Learning is split in two so that no update is lost. :meth:`learn` runs in backward, before
    FBGEMM has updated the rows, and only feeds the sketch. :meth:`settle` runs before the next
    lookup, when the step's update is in the rows: it re-assigns hot rows and copies to each new
    owner the very row that it was trained on, with its optimizer state.

    Args:
        layout: where the rank's part of the pool lies.
        tables: int64 ``[T, 5]``, rows of the ``tables`` argument of
            :func:`torchrec_cafe.ops.remap`, one per tracked table, in the order of ``index``.
        features: per feature, the number of its table, or -1: not tracked.
    """

    tables: Tensor
    _norms: Tensor
    _features: Tensor
    _hot_share: Tensor

    def __init__(self, layout: PoolLayout, tables: Tensor, features: Sequence[int]) -> None:
        """Allocate an empty sketch on the device of ``tables``; see the class."""
        super().__init__()
        self.layout = layout
        self.register_buffer("tables", tables, persistent=False)
        self._sketch = SketchState.empty(
            shards=layout.shards_held,
            buckets=layout.buckets_per_shard,
            hot_rows=layout.rows.hot_rows_per_shard,
            device=tables.device,
        )
        for name, tensor in self._sketch.tensors().items():
            self.register_buffer(f"_{name}", tensor, persistent=False)
        # Running sum and count of each table's gradient norms. Every rank sees the whole batch's
        # gradients, so all agree; each shard has a copy, so that it can move.
        norms = torch.zeros((layout.shards_held, len(tables), 2), dtype=torch.float64)
        self.register_buffer("_norms", norms.to(tables.device), persistent=False)
        self.register_buffer(
            "_features",
            torch.tensor(features, dtype=torch.int64, device=tables.device),
            persistent=False,
        )
        self._num_tracked = sum(index >= 0 for index in features)
        # Hot lookups and lookups of the last batch looked at.
        hot_share = torch.zeros(2, dtype=torch.int64, device=tables.device)
        self.register_buffer("_hot_share", hot_share, persistent=False)
        self._clock = _Clock()
        interval = layout.kind.rebalance_interval
        # It divides the interval, so that every shard has its turn once in it.
        self._turn_steps = math.gcd(interval, TURN_STEPS)
        self._turns: dict[int, Tensor] = {}
        self._hot_rows: HotRows | None = None
        self._counted = torch.ones(0)

    @property
    def sketch(self) -> SketchState:
        """The sketch's tensors, not copied."""
        if self._sketch.buckets is not self._buffers["_buckets"]:  # moved to another device
            self._sketch = SketchState(
                **{name: self.get_buffer(f"_{name}") for name in self._sketch.tensors()}
            )
        return self._sketch

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, not copied; the first axis is the virtual shard."""
        state = self.sketch.tensors() | {"norms": self._norms}
        return {f"sketch_{name}": tensor for name, tensor in state.items()}

    @property
    def first_shard(self) -> int:
        """Global number of the rank's first virtual shard."""
        return self.layout.first_shard

    @property
    def steps(self) -> int:
        """Steps learned from, since training began."""
        return self._clock.steps

    @property
    def unsettled(self) -> bool:
        """Whether a turn of settling is due."""
        return self._clock.unsettled

    @property
    def num_bytes(self) -> int:
        """Bytes of the state: sketch, map of owners and statistics."""
        return sum(t.numel() * t.element_size() for t in self.state_tensors().values())

    def hot_rows(self) -> HotRows:
        """Where a lookup finds the ids that own a row."""
        buckets = self.sketch.buckets
        if self._hot_rows is None or self._hot_rows.buckets is not buckets:
            self._hot_rows = HotRows(
                buckets=buckets,
                first_shard=self.layout.first_shard,
                num_shards=self.layout.num_shards,
                rows=self.layout.rows,
            )
        return self._hot_rows

    def clear(self) -> None:
        """Forget everything: no id owns a row, and none is tracked. The rows are left alone."""
        empty = SketchState.empty(
            shards=self.layout.shards_held,
            buckets=self.layout.buckets_per_shard,
            hot_rows=self.layout.rows.hot_rows_per_shard,
            device=self.tables.device,
        )
        for name, tensor in empty.tensors().items():
            self.sketch.tensors()[name].copy_(tensor)
        self._norms.zero_()
        self._hot_share.zero_()
        self.reload()

    def reload(self) -> None:
        """Take over what a checkpoint has written into the sketch's tensors."""
        steps = self.sketch.steps
        self._clock.steps = int(steps[0]) if steps.numel() else 0
        self._clock.unsettled = False

    @property
    def learns_from_gradients(self) -> bool:
        """Whether the norm of a bag's gradient says how much its ids matter."""
        return self.layout.kind.importance == "gradient_norm"

    def learn(self, grad: Tensor, offsets: Tensor, batch: Remapped, weights: Tensor | None) -> None:
        """Feed the sketch.

        Args:
            grad: float32 ``[B * F, D]``, gradient of the whole batch's pooled bags, contiguous.
            offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
            batch: what was looked up.
            weights: float32 ``[N]``, per-sample weight of each id; ``None``: all one.
        """
        features = self._features
        growth = self._growth((offsets.numel() - 1) // features.shape[0])
        if self.learns_from_gradients:
            learn(
                *(self.sketch, self._norms, grad, offsets, batch),
                features=features,
                weights=weights,
                decay=NORM_DECAY,
                growth=growth,
            )
        else:
            counted = self._ones(len(batch.keys)) if weights is None else weights.abs()
            observe(self.sketch, batch.keys, batch.shards, counted, growth=growth)
        self._end_step(batch)

    def learn_scaled(
        self,
        grad: Tensor,
        offsets: Tensor,
        batch: Remapped,
        weights: Tensor | None,
        scaled: ScaledRows,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`learn` from gradients, and what they mean for the weights that scaled the rows.

        Args:
            grad: as :meth:`learn` takes it.
            offsets: as :meth:`learn` takes them.
            batch: as :meth:`learn` takes it.
            weights: as :meth:`learn` takes them.
            scaled: the rows that were looked up.

        Returns:
            As :func:`torchrec_cafe.ops.factor_gradients`.
        """
        features = self._features
        gradients = learn_scaled(
            *(self.sketch, self._norms, grad, offsets, batch, scaled),
            features=features,
            weights=weights,
            decay=NORM_DECAY,
            growth=self._growth((offsets.numel() - 1) // features.shape[0]),
        )
        self._end_step(batch)
        return gradients

    def learn_unpooled(self, grad: Tensor, samples: int, batch: Remapped) -> None:
        """Feed the sketch with ids that were not pooled: each has a gradient of its own.

        The importance of an id is the norm of its gradient, in units of the running mean of its
        table *in its virtual shard*: a rank sees the gradients of its own ids only, and a shard
        is to learn the same on whichever rank it is.

        Args:
            grad: float32 ``[N, D]``, gradient of the ids' vectors.
            samples: of the whole batch.
            batch: what was looked up.

        Note:
            Deterministic for any number of ranks; on CUDA up to the order in which the norms of a
            table are added up.
        """
        if self.layout.shards_held > 0:
            from_grad = self.learns_from_gradients
            importance = self._importance(grad, batch) if from_grad else self._ones(len(grad))
            growth = self._growth(samples)
            observe(self.sketch, batch.keys, batch.shards, importance, growth=growth)
        self._end_step(batch)

    def _ones(self, count: int) -> Tensor:
        """float32 ``[count]``."""
        if self._counted.shape[0] < count or self._counted.device != self.tables.device:
            self._counted = torch.ones(2 * count, device=self.tables.device)
        return self._counted.narrow(0, 0, count)

    def _importance(self, grad: Tensor, batch: Remapped) -> Tensor:
        """The importance of ids that were not pooled, float32 ``[N]``; updates the means."""
        norms = torch.linalg.vector_norm(grad, dim=1)
        # NaN and infinity are no part of the mean; the sketch counts and skips them.
        counts = ((batch.shards >= 0) & norms.isfinite()).double()
        cells = batch.shards.clamp(min=0) * self._norms.shape[1] + (batch.keys >> ID_BITS)
        totals = self._norms.view(-1, 2)
        totals *= NORM_DECAY
        totals[:, 0].index_add_(0, cells, torch.where(counts > 0, norms, 0.0).double())
        totals[:, 1].index_add_(0, cells, counts)
        scales = torch.where(totals[:, 0] > 0, totals[:, 1] / totals[:, 0], 0.0).float()
        return norms * scales.index_select(0, cells)

    def _growth(self, samples: int) -> float:
        """What an occurrence counts more than one of the step before.

        Args:
            samples: of the whole batch, which every rank sees, so that all agree.
        """
        if samples != self._clock.samples:
            hot_rows = self.layout.num_shards * self.layout.rows.hot_rows_per_shard
            self._clock.samples = samples
            self._clock.growth = self.layout.kind.growth(samples * self._num_tracked / hot_rows)
        return self._clock.growth

    def _end_step(self, batch: Remapped) -> None:
        clock = self._clock
        if clock.steps % HOT_SHARE_INTERVAL == 0:
            hot = torch.count_nonzero(batch.rows >= self.layout.rows.offset)
            self._hot_share.copy_(torch.stack([hot, torch.count_nonzero(batch.shards >= 0)]))
        clock.steps += 1
        if clock.steps % self._turn_steps == 0:
            clock.unsettled = True

    def settle(self, rows: list[Tensor], touched: TouchedRows | None = None) -> None:
        """Re-assign the hot rows of the shards whose turn it is, if a turn is due.

        Args:
            rows: physical table and optimizer states, first axis physical rows; mutated.
            touched: notes the rows that change hands; ``None``: nobody wants to know.
        """
        if not self._clock.unsettled:
            return
        self._clock.unsettled = False
        layout = self.layout
        selected = self._selected()
        if selected.numel() == 0:
            return
        actions, new_keys = rebalance(
            self.sketch,
            selected,
            min_score=layout.kind.threshold or 0.0,
            hysteresis=layout.kind.hysteresis,
            num_medium=layout.num_medium,
        )
        moves = Moves(selected, actions, new_keys)
        if touched is not None:
            touched.mark_moved(moves, layout.rows)
        with torch.no_grad():
            for number, tensor in enumerate(rows):
                # Two rows were looked up as a sum; of their optimizer states the mean is taken.
                factor = 1.0 if number == 0 else 0.5
                move_rows(tensor, moves, self.tables, layout.rows, second_factor=factor)

    def _selected(self) -> Tensor:
        """The shards whose turn it is."""
        turns = self.layout.kind.rebalance_interval // self._turn_steps
        # By global number, so that the schedule does not depend on the number of ranks.
        first = (self.steps // self._turn_steps - self.layout.first_shard) % turns
        if first not in self._turns or self._turns[first].device != self.tables.device:
            last = max(first, self.layout.shards_held)
            self._turns[first] = torch.arange(first, last, turns, device=self.tables.device)
        return self._turns[first]

    def statistics(self) -> dict[str, float]:
        """What the sketch has done so far, for logs and TensorBoard.

        Returns:
            Per counter of :data:`torchrec_cafe.ops.COUNTERS`, steps apart, its total on this rank;
            the share of slots and of hot rows in use (``occupancy``, ``hot_occupancy``, in [0, 1])
            and of slots that are medium (``medium_occupancy``); ``hot_share``, the share of the
            tracked lookups of a recent batch that went to hot rows; and ``threshold``, the mean
            lowest score of a hot row, in average occurrences.
        """
        sketch = self.sketch
        totals = dict(zip(COUNTERS, sketch.counters.sum(0).tolist(), strict=True))
        del totals["steps"]  # of each shard, not of the rank
        hot = sketch.hot_rows > COLD
        lowest = torch.where(hot, sketch.scores, torch.inf).flatten(1).amin(1)
        lowest = (lowest.double() / sketch.inflation)[lowest.isfinite()]
        return totals | {
            "occupancy": (sketch.hot_rows != FREE).double().mean().item(),
            "hot_occupancy": (sketch.owners >= 0).double().mean().item(),
            "medium_occupancy": (sketch.hot_rows == MEDIUM).double().mean().item(),
            "hot_share": int(self._hot_share[0]) / max(1, int(self._hot_share[1])),
            "threshold": lowest.mean().item() if lowest.numel() else 0.0,
        }
