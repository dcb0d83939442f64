"""The report of the accuracy study: tables, a plot, a page of Markdown and a JSON file."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.quality_records import PAPER, RECOVERY, Records, figures, spread
from benchmarks.quality_run import BATCH_SIZE, DATA
from benchmarks.quality_traces import plot_traces, trace_figures, trace_table
from benchmarks.quality_variants import DEFAULT, VARIANTS, variant
from examples.dlrm.report import command_output, machine
from torchrec_cafe.config.text import as_text

_MINUS = "\N{MINUS SIGN}"
_HEADINGS = {
    "auc": "Test AUC",
    "log_loss": "Test log-loss, nats",
    "won_back": "Share of Hash's AUC loss that is won back",
    "ablation": "Changes to cafe: AUC less cafe's",
    "drift": f"A day after the shift: AUC less {DEFAULT}'s",
}


def summary(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation (number of seeds).

    Args:
        values: one per seed.
        form: a format specification, such as ``.4f``, ``+.4f`` or ``.0%``.
    """
    if not values:
        return ""
    text = format(statistics.fmean(values), form).replace("-", _MINUS)
    width = spread(values)
    if width is not None:
        text += f" ± {format(width, form.removeprefix('+'))}"
    return f"{text} ({len(values)})"


def _judged(text: str, target: str, *, met: bool) -> str:
    return f"{text}, target {target}: {'met' if met else 'NOT MET'}"


def _cell(records: Records, table: str, data: str, name: str, compression: float) -> str:
    at = (data, name, compression)
    if table in ("auc", "log_loss"):
        values = list(records.values(*at, table).values())
        return summary(values, ".4f" if table == "auc" else ".5f")
    if table == "won_back":
        won, target = records.won_back(*at), records.target(*at)
        text = summary(won, ".0%")
        if not won:
            return (
                "no loss" if records.over(*at, "hash") and records.values(data, "full", 1) else ""
            )
        if target is None:
            return text
        return _judged(text, f"{target:.0%}", met=statistics.fmean(won) >= target)
    over = records.over(*at, variant(name).baseline)
    text = summary(over, "+.4f")
    if name != "fresh" or not over or not records.judge:
        return text
    return _judged(text, f"≤ {RECOVERY:g}", met=statistics.fmean(over) <= RECOVERY)


def table_of(records: Records, table: str, data: str) -> list[list[str]]:
    """A table as rows of text, the header first; only the header if there is nothing to show.

    Args:
        records: of the study's runs.
        table: ``auc``, ``log_loss``, ``won_back``, ``ablation`` or ``drift``.
        data: of :data:`benchmarks.quality_run.DATA`.
    """
    names = records.variants(data, ablation=table in ("ablation", "drift"))
    if table == "won_back":
        names = [name for name in names if name not in ("full", "hash")]
    if table in ("ablation", "drift"):
        names = [name for name in names if bool(variant(name).data) == (table == "drift")]
    compressions = records.compressions(data, names)
    rows = [["tables", *("full" if c == 1 else f"{c:g}×" for c in compressions)]]
    for name in names:
        cells = []
        for compression in compressions:
            failed = compression in records.compressions(data, [name])
            failed = failed and not records.values(data, name, compression)
            cells.append("-" if failed else _cell(records, table, data, name, compression))
        rows.append([name, *cells])
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def as_text_report(records: Records, traces: Sequence[Mapping[str, Any]]) -> str:
    """The report for a terminal.

    Args:
        records: of the study's runs.
        traces: records of :mod:`benchmarks.quality_traces`.
    """
    parts = []
    for data in records.data:
        for table, heading in _HEADINGS.items():
            rows = table_of(records, table, data)
            if len(rows) > 1:
                parts.append(f"{DATA[data].title}: {heading}\n{as_text(rows)}")
        parts += records.notes(data)
    parts += [f"{record['trace']}: recall\n{as_text(trace_table(record))}" for record in traces]
    return "\n\n".join(parts) or "no runs yet"


def _section(records: Records, data: str) -> list[str]:
    lines = [f"## {DATA[data].title}", "", DATA[data].text, ""]
    for table, heading in _HEADINGS.items():
        rows = table_of(records, table, data)
        if len(rows) > 1:
            lines += [f"**{heading}**", "", *_markdown(rows)]
    notes = records.notes(data)
    if notes:
        lines += [
            "Notes, and cells without a result (-):",
            "",
            *(f"* {note}" for note in notes),
            "",
        ]
    return lines


def _traces_section(traces: Sequence[Mapping[str, Any]], picture: str) -> list[str]:
    lines = [
        "## Real access traces: recall of the hot set",
        "",
        "cache2k's traces (CC BY 4.0), real accesses of production systems, importance 1 each. As "
        "many rows as 1 % of the ids; recall is the share of the ids most accessed in an eighth of "
        "the trace that own a row at its end. Frozen: the hot set without decay at the end of the "
        "first eighth. Exact counts: what a perfect sketch without decay would keep.",
        "",
    ]
    for record in traces:
        title = f"**{record['trace']}**: {record['accesses']:,} accesses to {record['ids']:,} ids"
        lines += [f"{title}, {record['hot_rows']} rows", "", *_markdown(trace_table(record))]
    return [*lines, f"![recall by eighth]({picture})", ""]


def as_markdown(
    records: Records, traces: Sequence[Mapping[str, Any]], report: Mapping[str, Any], stem: str
) -> str:
    """The report as a page.

    Args:
        records: of the study's runs.
        traces: records of :mod:`benchmarks.quality_traces`.
        report: what :func:`as_json` made.
        stem: file name of the plots, without suffix.
    """
    used = {name for data in records.data for name in _all(records, data)}
    ordered = [*(name for name in VARIANTS if name in used), *sorted(used - set(VARIANTS))]
    over = records.over_budget()
    paper = ", ".join(f"{share:.0%} at {c:g}×" for c, share in PAPER.items())
    lines = ["# Accuracy: full, hashed and CAFE tables", ""]
    if used:
        lines += [
            "Mean ± standard deviation over seeds (number of seeds). One chronological epoch, "
            f"batch {BATCH_SIZE}, one thread; TorchRec's DLRM, dim 16, row-wise Adagrad. "
            "Differences and shares are taken seed by seed. Targets: on the generator the share "
            f"that the CAFE paper wins back on Criteo ({paper}), on the promotions the frequency "
            "oracle's; under drift, at most "
            f"{RECOVERY:g} AUC below a sketch that was emptied when the last day began.",
            "",
            f"![AUC against compression]({stem}.png)",
            "",
            *(f"* **{name}**: {variant(name).text}" for name in ordered),
            "",
            f"Tables that took more than dense bytes / compression: {', '.join(over) or 'none'}.",
            "",
        ]
    for data in records.data:
        lines += _section(records, data)
    if traces:
        lines += _traces_section(traces, f"{stem}_traces.png")
    commits = sorted({str(record.get("commit")) for record in records})
    lines += [
        f"`{report['command']}` at {report['commit']} on {report['machine']}"
        + (f"; runs at {', '.join(commits)}" if commits else ""),
        "",
    ]
    return "\n".join(lines)


def _all(records: Records, data: str) -> list[str]:
    return [n for ablation in (False, True) for n in records.variants(data, ablation=ablation)]


def as_json(records: Records, traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report in the form that every benchmark of this project writes.

    Args:
        records: of the study's runs.
        traces: records of :mod:`benchmarks.quality_traces`.
    """
    rows = [*figures(records), *(figure for record in traces for figure in trace_figures(record))]
    return {
        "benchmark": "quality",
        "commit": command_output("git", "describe", "--always", "--dirty"),
        "command": " ".join(["python -m benchmarks.quality", *sys.argv[1:]]),
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "runs": list(records),
        "traces": list(traces),
    }


def plot(path: Path, records: Records) -> None:
    """AUC against compression, one panel per data set.

    Args:
        path: PNG to write.
        records: of the study's runs.
    """
    data = records.data
    figure, panels = plt.subplots(
        1, len(data), figsize=(5 * len(data), 4.2), squeeze=False, constrained_layout=True
    )
    shown = [kept for name in data for kept in records.variants(name, ablation=False)]
    colors = {kept: f"C{number}" for number, kept in enumerate(dict.fromkeys(shown))}
    for axes, name in zip(panels[0], data, strict=True):
        for kept in records.variants(name, ablation=False):
            cells = {
                c: list(records.values(name, kept, c).values())
                for c in records.compressions(name, [kept])
            }
            cells = {c: values for c, values in cells.items() if values}
            means = [statistics.fmean(values) for values in cells.values()]
            errors = [spread(values) or 0.0 for values in cells.values()]
            if kept == "full" and means:
                axes.axhline(means[0], color="grey", linestyle="--", label=kept)
            elif means:
                axes.errorbar(
                    *(list(cells), means, errors),
                    marker="o",
                    markersize=4,
                    capsize=3,
                    color=colors[kept],
                    label=kept,
                )
        axes.set_xscale("log")
        axes.set(title=DATA[name].title, xlabel="compression", ylabel="test AUC")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(
    stem: Path, records: Records, traces: Sequence[Mapping[str, Any]], json_path: str = ""
) -> None:
    """Write ``<stem>.md``, ``.json`` and the plots.

    Args:
        stem: path of the report, without suffix.
        records: of the study's runs.
        traces: records of :mod:`benchmarks.quality_traces`.
        json_path: where to write the figures as well; empty: nowhere.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    report = as_json(records, traces)
    if records.data:
        plot(stem.with_name(f"{stem.name}.png"), records)
    if traces:
        plot_traces(stem.with_name(f"{stem.name}_traces.png"), traces)
    page = as_markdown(records, traces, report, stem.name)
    stem.with_name(f"{stem.name}.md").write_text(page)
    for path in (stem.with_name(f"{stem.name}.json"), *([Path(json_path)] if json_path else [])):
        path.write_text(json.dumps(report, indent=1) + "\n")
