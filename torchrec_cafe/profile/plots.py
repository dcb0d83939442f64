"""Plots of a table's coverage and hit rates, as SVG."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from torchrec_cafe.config import IdStatistics
from torchrec_cafe.profile.costs import CompressionCost
from torchrec_cafe.profile.report import TableReport, compression_text, count

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#2a8a57", "#8a8f98"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": "#c5c9d0",
    "axes.labelcolor": "#454b57",
    "axes.titlecolor": "#1d2230",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "svg.fonttype": "none",
    "svg.hashsalt": "torchrec-cafe",  # the same figures give the same bytes
    "legend.frameon": False,
}


def table_plot(table: TableReport, costs: list[CompressionCost]) -> str:
    """Coverage and hit rates of a table, side by side.

    Args:
        table: what is known of it.
        costs: the compressions of ``table.owning``.

    Returns:
        An SVG as a data URI.
    """
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.7), layout="constrained")
        _plot_coverage(left, table, costs)
        _plot_hits(right, table)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue().encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"


def _axes(axes: Axes, title: str, label: str, first: float, last: float) -> None:
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_xlim(first, max(last, 2 * first))
    axes.set_ylim(0, 104)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value).replace(".00", "")))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.set_yticks([0, 25, 50, 75, 100])


def _plot_coverage(axes: Axes, table: TableReport, costs: list[CompressionCost]) -> None:
    coverage = table.statistics.coverage
    rows = [point[0] for point in coverage]
    shares = [100 * point[1] for point in coverage]
    _axes(axes, "Lookups that the most frequent ids take", "ids", 1, rows[-1])
    axes.plot(rows, shares, color=BLUE, linewidth=1.8)
    axes.fill_between(rows, shares, color=BLUE, alpha=0.08, linewidth=0)
    for rows_owned, share, label in _marks(table, costs):
        axes.plot(rows_owned, 100 * share, "o", color=ORANGE, markersize=5, clip_on=False)
        # To the left of an ascending curve there is room, unless the axis is there.
        is_left = rows_owned < rows[-1] ** 0.2
        axes.annotate(
            label,
            (rows_owned, 100 * share),
            xytext=(7, -3) if is_left else (-7, 0),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="top" if is_left else "center",
            color=ORANGE,
            fontsize=8,
        )


def _marks(table: TableReport, costs: list[CompressionCost]) -> list[tuple[float, float, str]]:
    """Where compressions lie on the coverage; those at one place share a label."""
    last = table.statistics.coverage[-1][0]
    marks: dict[float, tuple[float, list[str]]] = {}
    for owning, cost in zip(table.owning, costs, strict=True):
        if owning is not None and owning.rows >= 1:
            labels = marks.setdefault(min(owning.rows, last), (owning.share, []))[1]
            labels.append(compression_text(cost.compression))
    return [(rows, share, ", ".join(labels)) for rows, (share, labels) in marks.items()]


def _plot_hits(axes: Axes, table: TableReport) -> None:
    statistics = table.statistics
    last = max(2 * statistics.num_distinct, 64)
    first = min(statistics.lru_hits[0][0], last / 4)
    _axes(axes, "Rows of a batch that a cache holds", "rows of the cache", first, last)
    _plot_curve(axes, statistics, "lru_hits", GREY, "LRU, 32-way")
    _plot_curve(axes, statistics, "lookahead_hits", GREEN, "look-ahead")
    for cache in table.caches:
        if cache.lookahead is not None:
            axes.plot(cache.rows, 100 * cache.lookahead, "o", color=GREEN, markersize=4)
    axes.legend(loc="best", fontsize=8, handlelength=1.4)


def _plot_curve(axes: Axes, statistics: IdStatistics, name: str, color: str, label: str) -> None:
    curve = getattr(statistics, name)
    rows = [point[0] for point in curve]
    axes.plot(rows, [100 * point[1] for point in curve], color=color, linewidth=1.8, label=label)
