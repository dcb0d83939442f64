"""What a kind adds to a lookup of a plain table, in bytes that a lookup reads or writes.

TorchRec's estimates of time are bytes over bandwidth. So are these, to be comparable: rows count as
they are, and what hashing, sketch and weights cost is expressed in the bytes that take as long. The
figures are fitted to steps measured on a CPU (``python -m benchmarks.plan_times``); on CUDA, where
nothing has been measured yet, the same are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_cafe.config import Cafe, Hash, Lookahead, MemRec, QuotientRemainder, TableKind


@dataclass(frozen=True, kw_only=True)
class LookupCost:
    """The cost of a lookup beyond that of a row of a plain table.

    Attributes:
        rows: rows looked up for an id.
        forward_bytes: of an id, in the forward pass.
        backward_bytes: of an id, in the backward pass.
        bag_bytes: of a bag, in the backward pass.
        bag_rows: rows' worth of work for a bag, in the backward pass.
    """

    rows: float = 1.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    bag_bytes: float = 0.0
    bag_rows: float = 0.0

    @classmethod
    def of(cls, kind: TableKind) -> LookupCost:
        """The cost of a kind.

        Args:
            kind: any of the kinds.
        """
        if isinstance(kind, Cafe):
            # Some ids look up a second row; the sketch is read, then learns a norm per bag.
            factors = kind.weight_hashes
            return cls(
                rows=1.0 + kind.medium_fraction / 2,
                forward_bytes=96 + 24 * factors,
                backward_bytes=64 + 32 * factors,
                bag_bytes=64,
                bag_rows=0.25 + (0.5 if factors else 0.0),
            )
        if isinstance(kind, MemRec):
            return cls(
                rows=kind.num_hashes,
                forward_bytes=48 * kind.num_hashes + 24 * kind.num_weight_hashes,
                backward_bytes=48 * kind.num_hashes + 32 * kind.num_weight_hashes,
                bag_rows=0.5,
            )
        if isinstance(kind, QuotientRemainder):
            return cls(rows=2.0, forward_bytes=32)
        if isinstance(kind, Lookahead):
            return cls(forward_bytes=32 if kind.path is None else 4096)
        assert isinstance(kind, Hash)
        return cls(forward_bytes=16)

    def forward(self, row_bytes: float, pooling: float) -> float:
        """How many times as long as a plain table's forward pass.

        Args:
            row_bytes: of a row, > 0.
            pooling: mean lookups of a bag, >= 1; a bag's row is written once.
        """
        plain = row_bytes * (1 + 1 / pooling)
        return (row_bytes * (self.rows + 1 / pooling) + self.forward_bytes) / plain

    def backward(self, row_bytes: float, pooling: float) -> float:
        """How many times as long as a plain table's backward pass.

        Args:
            row_bytes: of a row, > 0.
            pooling: mean lookups of a bag, >= 1.
        """
        plain = row_bytes * (1 + 1 / pooling)
        bag = (self.bag_bytes + self.bag_rows * row_bytes) / pooling
        return (row_bytes * (self.rows + 1 / pooling) + self.backward_bytes + bag) / plain
