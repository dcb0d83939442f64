"""The plots of a report. A kind has the same colour in all of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from examples.dlrm.config import KINDS
from examples.dlrm.loop import Result
from examples.dlrm.step_parts import PURPOSES

#: writes a picture
Picture = Callable[[Path], object]

#: of each kind, in every plot
COLOURS = {kind: plt.get_cmap("tab10")(number) for number, kind in enumerate(KINDS)}
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Trace:
    """What the hot rows of a pool did over a training.

    Attributes:
        name: of the training, for the legend.
        kind: of the tables.
        hot_share: samples trained and share of the lookups that went to hot rows.
        promotions: samples trained and promotions so far.
    """

    name: str
    kind: str
    hot_share: Sequence[tuple[int, float]]
    promotions: Sequence[tuple[int, float]]


def _picture(figure: Figure) -> Picture:
    def write(path: Path) -> None:
        figure.savefig(path, dpi=120)
        plt.close(figure)

    return write


def auc_by_bytes(results: Sequence[Result], description: str) -> Picture:
    """AUC against embedding bytes, one line per kind.

    Args:
        results: of every kind, compression and seed.
        description: of the data, for the title.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    kinds = list(dict.fromkeys(result.kind for result in results))
    for kind in kinds:
        sizes = sorted({r.embedding_bytes for r in results if r.kind == kind})
        groups = [
            [r.auc for r in results if r.kind == kind and r.embedding_bytes == size]
            for size in sizes
        ]
        aucs = [statistics.fmean(group) for group in groups]
        spreads = [statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups]
        mib = [size / 2**20 for size in sizes]
        style = {"marker": "o", "capsize": 3, "color": COLOURS[kind], "label": kind}
        axes.errorbar(mib, aucs, yerr=spreads, **style)
        if kind == "full":
            axes.axhline(aucs[0], color=COLOURS[kind], linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("embedding MiB (weights, sketches, maps)")
    axes.set_ylabel("test AUC")
    axes.set_title(description, fontsize=8, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return _picture(figure)


def hot_share(traces: Sequence[Trace]) -> Picture | None:
    """Share of the lookups that go to hot rows, and promotions, against samples trained.

    Args:
        traces: of each training and pool.

    Returns:
        ``None`` without hot rows.
    """
    if not traces:
        return None
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5.5), sharex=True, constrained_layout=True, height_ratios=(3, 2)
    )
    names: defaultdict[str, list[str]] = defaultdict(list)  # by kind
    for trace in traces:
        of_kind = names[trace.kind]
        label = "" if trace.name in of_kind else trace.name  # once for all seeds
        of_kind += [label] if label else []
        number = of_kind.index(trace.name)
        style = {"color": COLOURS[trace.kind], "linestyle": _STYLES[number % len(_STYLES)]}
        above.plot(*_columns(trace.hot_share), label=label, **style)
        below.plot(*_columns(_rates(trace.promotions)), **style)
    above.set_ylabel("share of lookups\nthat go to hot rows")
    above.set_ylim(bottom=0)
    handles = above.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8)
    below.set_ylabel("promotions per\n1000 samples")
    below.set_ylim(bottom=0)
    below.set_xlabel("samples trained")
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return _picture(figure)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _rates(totals: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Increase of a total per thousand samples, between each two points."""
    return [
        (end, 1000 * (after - before) / (end - begin))
        for (begin, before), (end, after) in zip(totals, totals[1:], strict=False)
        if end > begin
    ]


def step_time(parts: Mapping[str, Mapping[str, float]]) -> Picture | None:
    """Milliseconds of a training step by what they are for, one bar per training.

    Args:
        parts: by name of the training, what :func:`examples.dlrm.step_parts.by_purpose` gives.

    Returns:
        ``None`` without any.
    """
    if not parts:
        return None
    height = 1.9 + 0.45 * len(parts)
    figure, axes = plt.subplots(figsize=(8, height), constrained_layout=True)
    names = list(parts)
    left = [0.0] * len(names)
    longest = max(sum(of_name.values()) for of_name in parts.values())
    # Not the colours of kinds.
    colours = plt.get_cmap("Set3")
    for number, purpose in enumerate(PURPOSES):
        widths = [parts[name][purpose] for name in names]
        axes.barh(names, widths, left=left, label=purpose, color=colours(number), edgecolor="white")
        _write_widths(axes, widths, left, 0.07 * longest)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlim(0, 1.02 * longest)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of the host for a step, under the profiler; rank 0")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8
    )
    return _picture(figure)


def _write_widths(axes: Axes, widths: Sequence[float], left: Sequence[float], least: float) -> None:
    """Write the milliseconds into the bars that have room for them."""
    for row, (width, begin) in enumerate(zip(widths, left, strict=True)):
        if width > least:
            middle = begin + width / 2
            axes.text(middle, row, f"{width:.1f}", ha="center", va="center", fontsize=7)
