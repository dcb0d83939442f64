"""The records of the accuracy study, and their figures, paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Row
from benchmarks.quality_run import DATA, DONE
from benchmarks.quality_variants import DEFAULT, MEM_REC_DEFAULT, VARIANTS, trained_as, variant

#: share of Hash's AUC loss that the CAFE paper wins back on Criteo, by compression
PAPER = {100.0: 0.81, 1000.0: 0.78, 10000.0: 0.56}
#: how far below a freshly warmed sketch's Cafe's AUC may be, a day after the shift
RECOVERY = 0.002
_UNITS = {"auc": "", "log_loss": "nats", "embedding_bytes": "bytes"}

#: a metric of one cell of the study, by seed
BySeed = Mapping[int, float]


@dataclass
class Figure(Row):
    """The mean of a figure over several seeds.

    Attributes:
        spread: standard deviation over the seeds.
        seeds: how many.
    """

    spread: float | None = None
    seeds: int = 1


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over the seeds, of more than one."""
    return statistics.stdev(values) if len(values) > 1 else None


def differences(values: BySeed, baseline: BySeed) -> list[float]:
    """By how much values exceed a baseline, seed by seed."""
    return [value - baseline[seed] for seed, value in values.items() if seed in baseline]


def won_back(full: BySeed, hashed: BySeed, own: BySeed) -> list[float]:
    """Share of Hash's AUC loss against full tables that is won back, seed by seed.

    Args:
        full: AUC of full tables.
        hashed: AUC of Hash.
        own: AUC of what wins back.

    Returns:
        Nothing if there is a seed with which Hash loses nothing.
    """
    seeds = [seed for seed in own if seed in full and seed in hashed]
    if any(full[seed] <= hashed[seed] for seed in seeds):
        return []
    return [(own[seed] - hashed[seed]) / (full[seed] - hashed[seed]) for seed in seeds]


def _defaults_of(name: str, compression: float) -> list[str]:
    """The defaults whose runs, at a compression, are those of a variant."""
    if compression <= 1:
        return []
    defaults = (DEFAULT, MEM_REC_DEFAULT)
    return [default for default in defaults if name == trained_as(default, compression)]


class Records:
    """What the runs of a study came to, by data set, variant, compression and seed.

    Args:
        records: as :mod:`benchmarks.quality_run` writes them.
        judge: whether to hold them to the targets.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], *, judge: bool = True) -> None:
        self.judge = judge
        self._cells: dict[tuple[str, str, float], dict[int, Mapping[str, Any]]] = {}
        for record in sorted(records, key=lambda record: record["seed"]):
            key = (record["data"], record["variant"], record["compression"])
            self._cells.setdefault(key, {})[record["seed"]] = record

    @property
    def data(self) -> list[str]:
        """Data sets, in the study's order."""
        return [name for name in DATA if any(key[0] == name for key in self._cells)]

    def variants(self, data: str, *, ablation: bool) -> list[str]:
        """Variants of a data set in the study's order, those made from arguments last.

        Args:
            data: the data set.
            ablation: which variants: those compared with one other variant, or all others. The
                latter leave out what has no name of its own and stands for a default wherever it
                was trained.
        """
        found = {name for of, name, _ in self._keys() if of == data}
        if not ablation:
            cells = {(name, c) for of, name, c in self._cells if of == data}
            found = {name for name, c in cells if not _defaults_of(name, c)} | found & set(VARIANTS)
        ordered = [*VARIANTS, *sorted(found - set(VARIANTS))]
        return [n for n in ordered if n in found and variant(n).ablation == ablation]

    def compressions(self, data: str, names: Sequence[str]) -> list[float]:
        """Compressions of some variants of a data set, ascending."""
        return sorted({c for of, name, c in self._keys() if of == data and name in names})

    def _keys(self) -> Iterator[tuple[str, str, float]]:
        """All cells, those too that stand for others."""
        for data, name, compression in self._cells:
            yield data, name, compression
            for default in _defaults_of(name, compression):
                yield data, default, compression

    def values(self, data: str, name: str, compression: float, metric: str = "auc") -> BySeed:
        """A metric of the finished runs."""
        cell = self._cells.get((data, trained_as(name, compression), compression), {})
        return {seed: r[metric] for seed, r in cell.items() if r["status"] == DONE}

    def over(self, data: str, name: str, compression: float, baseline: str) -> list[float]:
        """By how much the AUC of a variant exceeds another's, seed by seed."""
        own = self.values(data, name, compression)
        return differences(own, self.values(data, baseline, compression))

    def won_back(self, data: str, name: str, compression: float) -> list[float]:
        """Share of Hash's AUC loss that a variant wins back, seed by seed."""
        full, hashed = self.values(data, "full", 1.0), self.values(data, "hash", compression)
        return won_back(full, hashed, self.values(data, name, compression))

    def target(self, data: str, name: str, compression: float) -> float | None:
        """The share to win back: the paper's on the generator, the oracle's on the promotions."""
        if not self.judge or name != DEFAULT or data not in ("promotions", "generator"):
            return None
        if data == "generator":
            return PAPER.get(compression)
        oracle = self.won_back(data, "oracle", compression)
        return statistics.fmean(oracle) if oracle else None

    def notes(self, data: str) -> list[str]:
        """Which runs have no result, and why; and whether the data changed between runs."""
        notes = []
        logs = {r["fingerprint"] for r in self if r["data"] == data and "fingerprint" in r}
        if len(logs) > 1:
            notes.append(f"{data}: the runs saw {len(logs)} different logs, remove the old records")
        for (of, name, compression), cell in self._cells.items():
            reasons: dict[str, list[str]] = {}
            for seed, record in cell.items():
                if record["status"] != DONE:
                    reason = f"{record['status']}: {record['error']}"
                    reasons.setdefault(reason, []).append(str(seed))
            if of == data:
                notes += [
                    f"{name} at {compression:g}×, seed {', '.join(seeds)}, {reason}"
                    for reason, seeds in reasons.items()
                ]
        return notes

    def over_budget(self) -> list[str]:
        """Finished runs whose tables took more than dense bytes / compression; should be none."""
        return [
            f"{data}/{name}@{compression:g}x"
            for data, name, compression in self._cells
            for dense in set(self.values(data, "full", 1.0, "embedding_bytes").values())
            for used in set(self.values(data, name, compression, "embedding_bytes").values())
            if used > dense / compression
        ]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for cell in self._cells.values():
            yield from cell.values()


def figures(records: Records) -> list[Figure]:
    """Every figure of a study.

    Args:
        records: of its runs.
    """
    return [
        figure
        for data in records.data
        for ablation in (False, True)
        for name in records.variants(data, ablation=ablation)
        for compression in records.compressions(data, [name])
        for figure in _figures_of(records, data, name, compression)
    ]


def _figures_of(records: Records, data: str, name: str, compression: float) -> Iterator[Figure]:
    prefix = f"{data}/{name}" + ("" if name == "full" else f"@{compression:g}x")

    def figure(
        what: str, unit: str, values: Sequence[float], base: BySeed, target: float | None = None
    ) -> Iterator[Figure]:
        if values:
            mean, baseline = statistics.fmean(values), None
            if base:
                baseline = statistics.fmean(base.values())
            counts = {"spread": spread(values), "seeds": len(values)}
            yield Figure(f"{prefix}/{what}", mean, unit, baseline, target, **counts)

    for metric, unit in (_UNITS | {"samples_per_second": "samples/s"}).items():
        full = {} if name == "full" else records.values(data, "full", 1.0, metric)
        values = records.values(data, name, compression, metric)
        yield from figure(metric, unit, list(values.values()), full)

    def over(baseline: str, target: Any = None) -> Iterator[Figure]:
        values = records.over(data, name, compression, baseline)
        base = records.values(data, baseline, compression)
        yield from figure(f"auc_over_{baseline}", "", values, base, target)

    if variant(name).ablation:
        yield from over(variant(name).baseline)
    elif name not in ("full", "hash"):
        won = records.won_back(data, name, compression)
        target = records.target(data, name, compression)
        yield from figure("won_back", "share of hash's AUC loss", won, {}, target)
    if name == DEFAULT and records.judge:
        # Never negative, beyond the seeds' spread.
        yield from over("hash", -(spread(records.over(data, name, compression, "hash")) or 0.0))
        yield from over("fresh", -RECOVERY)
