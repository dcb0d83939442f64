"""Budget mode: which ways of keeping a table a planner may choose. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torchrec_cafe.config.budget import TableKind
from torchrec_cafe.config.cafe import Cafe
from torchrec_cafe.config.kinds import KINDS
from torchrec_cafe.config.lookahead import Lookahead
from torchrec_cafe.config.mem_rec import MemRec
from torchrec_cafe.config.memory import TableShape
from torchrec_cafe.config.statistics import IdStatistics

#: What a kind or a template of one can be.
Allowed = type[TableKind] | TableKind


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The planner chooses, for every table without a kind of its own, how it is kept.

    Attributes:
        allow: kinds that may be chosen besides plain tables: classes, or instances whose other
            arguments are kept (``Lookahead(path="/nvme")``).
        max_compression: highest compression of a table, >= 1.
        stats: by table, what its ids are like; of ``torchrec-cafe profile``. Tables without are
            compressed only if nothing else fits.
        compressions: that are tried, each >= 1.
        cache_fractions: of look-ahead tables and of TorchRec's caches that are tried, in (0, 1).
        risk_weight: price of accuracy in time, >= 0: lookups that share their rows with other ids
            count as if they took this many times longer than those of a plain table.
    """

    allow: Sequence[Allowed] = (Cafe, MemRec, Lookahead)
    max_compression: float = 1000.0
    stats: Mapping[str, IdStatistics] = field(default_factory=lambda: MappingProxyType({}))
    compressions: Sequence[float] = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
    cache_fractions: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.4)
    risk_weight: float = 10.0

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if an argument is out of range.
            TypeError: if ``allow`` holds anything but kinds.
        """
        for allowed in self.allow:
            kind = allowed if isinstance(allowed, type) else type(allowed)
            if kind not in KINDS.values():
                raise TypeError(
                    f"Auto: `allow` must hold kinds ({', '.join(KINDS)}) or instances of them, got "
                    f"{allowed!r}"
                )
        checks: dict[str, tuple[str, bool]] = {
            "max_compression": (">= 1", self.max_compression >= 1),
            "compressions": ("numbers >= 1", all(c >= 1 for c in self.compressions)),
            "cache_fractions": ("in (0, 1)", all(0 < f < 1 for f in self.cache_fractions)),
            "risk_weight": (">= 0", self.risk_weight >= 0),
        }
        for name, (wanted, holds) in checks.items():
            if not holds:
                raise ValueError(f"Auto: {name} must be {wanted}, got {getattr(self, name)!r}")

    def kinds(self, table: TableShape) -> list[TableKind]:
        """The kinds that a table can have, alone in its group.

        Args:
            table: the table; what leaves it without a row is left out.
        """
        found: list[TableKind] = []
        for allowed in self.allow:
            for kind in self._variants(allowed):
                try:
                    kind.allocate([table])
                except ValueError:  # too small to be compressed so much
                    continue
                found.append(kind)
        return found

    def _variants(self, allowed: Allowed) -> list[TableKind]:
        kind = allowed if isinstance(allowed, type) else type(allowed)
        if kind is Lookahead:
            return [_variant(allowed, cache_fraction=f) for f in self.cache_fractions]
        wanted = {c for c in self.compressions if c <= self.max_compression}
        return [_variant(allowed, compression=c) for c in sorted(wanted | {self.max_compression})]

    def risk(self, kind: TableKind | None, table: TableShape) -> float | None:
        """Share of a table's lookups whose rows other ids share, in [0, 1]; ``None``: unknown.

        Args:
            kind: how the table would be kept; ``None``: plain.
            table: the table.
        """
        if kind is None or isinstance(kind, Lookahead):
            return 0.0
        allocation = kind.allocate([table])
        if allocation.shared_rows[table.name] >= table.num_embeddings:
            return 0.0
        statistics = self.stats.get(table.name)
        if statistics is None:
            return None
        owners = allocation.num_shards * allocation.hot_rows_per_shard
        return 1.0 - statistics.share_owning(owners)


def _variant(allowed: Any, **changes: Any) -> TableKind:
    if isinstance(allowed, type):
        return allowed(**changes)
    if isinstance(allowed, MemRec):
        changes["num_token_rows"] = None  # what it has instead of a compression
    return dataclasses.replace(allowed, **changes)
