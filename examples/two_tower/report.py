"""What a run of the two towers leaves behind: a table, a JSON file, a page, a plot."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.dlrm.report import command_output, machine
from examples.two_tower.config import TwoTowerConfig
from examples.two_tower.loop import AT, CURVE, Result
from examples.two_tower.purchases import DESCRIPTION
from torchrec_cafe.config.text import as_text

_COLUMNS = ("tables", *(f"recall@{k}" for k in AT), "embedding bytes", "purchases/s")


def groups_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of all seeds, by name of the kind and, if it is not 1, compression."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        plain = result.compression == 1
        name = result.kind if plain else f"{result.kind} {result.compression:g}x"
        groups.setdefault(name, []).append(result)
    return groups


def _recall(results: Sequence[Result], k: int) -> tuple[float, float]:
    values = [result.recall[k] for result in results]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: Sequence[Result]) -> list[list[str]]:
    """The comparison as rows of text, the header first.

    Args:
        results: of every kind, compression and seed.
    """
    rows: list[list[str]] = [[*_COLUMNS]]
    for name, group in groups_of(results).items():
        recalls = [_recall(group, k) for k in AT]
        speed = statistics.fmean(result.purchases_per_second for result in group)
        rows.append(
            [
                name,
                *(f"{mean:.4f}" + (f" ± {s:.4f}" if len(group) > 1 else "") for mean, s in recalls),
                f"{group[0].embedding_bytes:,}",
                f"{speed:,.0f}",
            ]
        )
    return rows


def as_json(results: Sequence[Result], sizes: dict[str, int]) -> dict[str, Any]:
    """The report in the form that every benchmark of this project writes.

    Args:
        results: of every kind, compression and seed.
        sizes: how many purchases were trained on, and how many looked for.
    """
    rows: list[dict[str, Any]] = []
    for name, group in groups_of(results).items():
        values = {f"recall@{k}": (_recall(group, k)[0], "share of queries") for k in CURVE}
        values["embedding_bytes"] = (float(group[0].embedding_bytes), "bytes")
        speed = statistics.fmean(result.purchases_per_second for result in group)
        values["purchases_per_second"] = (speed, "purchases/s")
        rows += [
            {
                "name": f"{name.replace(' ', '@')}/{metric}",
                "value": value,
                "unit": unit,
                "baseline": None,
                "target": None,
                "met": None,
            }
            for metric, (value, unit) in values.items()
        ]
    return {
        "benchmark": "two_tower",
        "commit": command_output("git", "rev-parse", "HEAD"),
        "command": " ".join(["python -m examples.two_tower.train", *sys.argv[1:]]),
        "machine": machine(),
        "data": DESCRIPTION,
        "samples": sizes,
        "rows": rows,
    }


def _as_markdown(report: dict[str, Any], rows: Sequence[Sequence[str]]) -> str:
    header, *body = [" | ".join(row) for row in rows]
    lines = [
        "# Two towers",
        "",
        f"{report['data']}. Trained on {report['samples']['train']:,} of weeks 1–44; "
        f"{report['samples']['test']:,} of weeks 45–53 looked for among all products.",
        "",
        f"| {header} |",
        "|" + "---|" * len(rows[0]),
        *(f"| {row} |" for row in body),
        "",
        "recall@k: share of the later purchases whose product is among the k that the model ranks "
        "first. popular: the products that are bought most, for everyone. Embedding bytes: "
        "weights, sketches and maps as allocated, over all ranks.",
        "",
        "![recall against the number of recommendations](report.png)",
        "",
        f"`{report['command']}` at {report['commit']} on {report['machine']}",
        "",
    ]
    return "\n".join(lines)


def _plot(path: Path, results: Sequence[Result]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for name, group in groups_of(results).items():
        recalls = [_recall(group, k)[0] for k in CURVE]
        style = {"color": "grey", "linestyle": ":"} if name == "popular" else {"marker": "o"}
        axes.plot(CURVE, recalls, label=name, **style)  # pyright: ignore[reportArgumentType]
    axes.set_xscale("log")
    axes.set_xlabel("recommendations, k")
    axes.set_ylabel("recall@k of later purchases")
    axes.set_title(DESCRIPTION, fontsize=8, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save(config: TwoTowerConfig, results: Sequence[Result], sizes: dict[str, int]) -> str:
    """Write ``report.json``, ``report.md`` and ``report.png``.

    Args:
        config: options of the run; ``config.out`` is the folder.
        results: of every kind, compression and seed.
        sizes: as :func:`as_json` takes them.

    Returns:
        The comparison as text.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows, report = table(results), as_json(results, sizes)
    _plot(out / "report.png", results)
    (out / "report.md").write_text(_as_markdown(report, rows))
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return as_text(rows)
