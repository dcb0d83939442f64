"""How often the ids of a table are looked up, id by id."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class IdCounts:
    """Lookups of the ids of one table.

    Attributes:
        ids: int64 ``[N]`` on the CPU, distinct, ascending.
        counts: float64 ``[N]``, lookups of each, > 0 and finite.
        uncounted: what each other id weighs beside them, > 0. Half a lookup (Jeffreys' prior) fits
            ids that were never seen; give more if only the most frequent ids are listed.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a value is not.
    """

    ids: Tensor
    counts: Tensor
    uncounted: float = 0.5

    def __post_init__(self) -> None:
        """Check the fields; see the class."""
        if self.ids.dtype is not torch.int64 or self.counts.dtype is not torch.float64:
            raise TypeError(
                "IdCounts: `ids` must be torch.int64 and `counts` torch.float64, got "
                f"{self.ids.dtype} and {self.counts.dtype}; use IdCounts.of(ids)"
            )
        if self.ids.dim() != 1 or self.ids.shape != self.counts.shape:
            raise ValueError(
                "IdCounts: `ids` and `counts` must have the same shape [N], got "
                f"{list(self.ids.shape)} and {list(self.counts.shape)}"
            )
        if (self.ids.diff() <= 0).any():
            raise ValueError("IdCounts: `ids` must be distinct and ascend; use IdCounts.of(ids)")
        if not (self.counts.isfinite() & (self.counts > 0)).all():
            raise ValueError("IdCounts: `counts` must be > 0 and finite; leave other ids out")
        if not 0 < self.uncounted < float("inf"):
            raise ValueError(f"IdCounts: `uncounted` must be > 0 and finite, got {self.uncounted}")

    @classmethod
    def of(cls, ids: Tensor, counts: Tensor | None = None, *, uncounted: float = 0.5) -> IdCounts:
        """Count ids.

        Args:
            ids: integers ``[N]``, in any order; equal ones are added up.
            counts: lookups of each of ``ids``; ``None``: one.
            uncounted: see the class.

        Raises:
            ValueError: as the class.
        """
        distinct, which = ids.cpu().long().unique(return_inverse=True)
        each = torch.ones_like(which, dtype=torch.float64) if counts is None else counts.cpu()
        total = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, which, each.double())
        return cls(ids=distinct, counts=total, uncounted=uncounted)

    def weights(self, begin: int, end: int) -> Tensor:
        """What each id of a range weighs: its lookups, or ``uncounted``; float64 ``[end - begin]``.

        Args:
            begin: first id.
            end: after the last id.
        """
        first, last = torch.searchsorted(self.ids, torch.tensor([begin, end])).tolist()
        result = torch.full((end - begin,), self.uncounted, dtype=torch.float64)
        result[self.ids[first:last] - begin] = self.counts[first:last]
        return result
