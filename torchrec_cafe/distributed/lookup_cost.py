"""How much longer a lookup of a kind takes than one of a plain table.

The figures are what a step of a kind took over one of plain tables, forward, backward and update,
on one thread of a CPU: means over dims 16 to 128, 1 and 20 ids a bag (``python -m
benchmarks.plan_times``). Compressed tables can be faster there than plain ones, because they lie in
caches. On CUDA nothing has been measured yet: the same is assumed, but nothing faster than plain.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_cafe.config import Cafe, Hash, Lookahead, MemRec, QuotientRemainder, TableKind

# A batch is planned while the two before it are in use: their rows must be in slots, too.
_BATCHES_IN_SLOTS = 3


@dataclass(frozen=True, kw_only=True)
class LookupCost:
    """What lookups of a table cost.

    Attributes:
        times: as long as those of a plain table.
        slots: of a rank, of a table whose rows lie in files; 0 for all others.
        batches: of a rank's size that a rank looks up: those of all ranks that send it ids.
    """

    times: float
    slots: int = 0
    batches: float = 1.0

    @classmethod
    def of(
        cls, kind: TableKind, *, on_cpu: bool, slots: int = 0, batches: float = 1.0
    ) -> LookupCost:
        """The cost of a kind.

        Args:
            kind: any of the kinds.
            on_cpu: whether the compute device is the CPU.
            slots: of a rank, of a look-ahead table.
            batches: see the class.
        """
        times = _times(kind)
        in_files = isinstance(kind, Lookahead) and kind.path is not None
        return cls(
            times=times if on_cpu else max(1.0, times),
            slots=slots if in_files else 0,
            batches=batches,
        )

    def factor(self, lookups: float) -> float:
        """As long as a plain table's, for so many lookups.

        Args:
            lookups: of a rank's batch.
        """
        if self.slots == 0:
            return self.times
        # Rows that do not stay in slots from batch to batch come and go by the disk.
        needed = max(1.0, _BATCHES_IN_SLOTS * lookups * self.batches)
        return self.times + 60.0 * max(0.0, 1.0 - self.slots / needed)


def _times(kind: TableKind) -> float:
    if isinstance(kind, Cafe):
        return 0.9 + 0.12 * kind.weight_hashes
    if isinstance(kind, MemRec):
        return 0.8 + 0.4 * (kind.num_hashes - 1) + 0.09 * kind.num_weight_hashes
    if isinstance(kind, QuotientRemainder):
        return 0.9
    if isinstance(kind, Lookahead):
        return 1.0 if kind.path is None else 1.1
    assert isinstance(kind, Hash)
    return 0.55
