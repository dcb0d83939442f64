"""What a run leaves behind: a table, a JSON file, a page of Markdown and a plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from examples.dlrm.config import EXACT_KINDS, TrainConfig
from examples.dlrm.data import ClickLog
from examples.dlrm.loop import Result
from torchrec_cafe.config.text import as_text

_COLUMNS = ("tables", "AUC", "won back", "log-loss", "embedding bytes", "samples/s")
_METRICS = {
    "auc": "",
    "log_loss": "nats",
    "embedding_bytes": "bytes",
    "samples_per_second": "samples/s",
}


def _names(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by name of their kind, ``hash`` or, with several compressions, ``hash@100x``."""
    several = len({result.compression for result in results if result.kind not in EXACT_KINDS}) > 1
    groups: dict[str, list[Result]] = {}
    for result in results:
        plain = result.kind in EXACT_KINDS or not several
        name = result.kind if plain else f"{result.kind}@{result.compression:g}x"
        groups.setdefault(name, []).append(result)
    return groups


def _mean(results: Sequence[Result], metric: str) -> float:
    return statistics.fmean(getattr(result, metric) for result in results)


def _spread(results: Sequence[Result], metric: str) -> float | None:
    values = [getattr(result, metric) for result in results]
    return statistics.stdev(values) if len(values) > 1 else None


def _won_back(name: str, groups: dict[str, list[Result]], kind: str = "hash") -> float | None:
    """Share of a hashed kind's AUC loss that Cafe wins back at the same compression."""
    own, at, compression = name.partition("@")
    baseline = f"{kind}{at}{compression}"
    if not own.startswith("cafe") or baseline not in groups or "full" not in groups:
        return None
    full, hashed = _mean(groups["full"], "auc"), _mean(groups[baseline], "auc")
    return (_mean(groups[name], "auc") - hashed) / (full - hashed) if full > hashed else None


def table(results: Sequence[Result]) -> list[list[str]]:
    """The comparison as rows of text, the header first.

    Args:
        results: of every kind, compression and seed.
    """
    groups = _names(results)
    rows: list[list[str]] = [[*_COLUMNS]]
    for name, group in groups.items():
        spread = _spread(group, "auc")
        won = _won_back(name, groups)
        rows.append(
            [
                name,
                f"{_mean(group, 'auc'):.4f}" + (f" ± {spread:.4f}" if spread is not None else ""),
                "" if won is None else f"{won:.0%}",
                f"{_mean(group, 'log_loss'):.5f}",
                f"{_mean(group, 'embedding_bytes'):,.0f}",
                f"{_mean(group, 'samples_per_second'):,.0f}",
            ]
        )
    return rows


def command_output(*command: str) -> str:
    """What a command prints, or ``unknown`` if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def machine() -> str:
    """Processor, accelerator and torch of this machine, in words."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} x {cpu}{device}, torch {torch.__version__}"


def as_json(config: TrainConfig, log: ClickLog, results: Sequence[Result]) -> dict[str, Any]:
    """The report in the form that every benchmark of this project writes.

    Args:
        config: options of the run.
        log: the data set.
        results: of every kind, compression and seed.
    """
    groups = _names(results)
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, baseline: float | None, spread: Any = None) -> None:
        row = {"name": name, "value": value, "unit": unit, "baseline": baseline}
        rows.append(row | {"target": None, "met": None, "spread": spread})

    for name, group in groups.items():
        for metric, unit in _METRICS.items():
            full = _mean(groups["full"], metric) if "full" in groups and name != "full" else None
            add(f"{name}/{metric}", _mean(group, metric), unit, full, _spread(group, metric))
        for kind, suffix in (("hash", ""), ("hash_whole", "_from_hash_whole")):
            won = _won_back(name, groups, kind)
            if won is not None:
                add(f"{name}/won_back{suffix}", won, f"share of {kind}'s AUC loss", 0.0)
    return {
        "benchmark": "dlrm",
        "commit": command_output("git", "rev-parse", "HEAD"),
        "command": " ".join(["python -m examples.dlrm.train", *sys.argv[1:]]),
        "machine": machine(),
        "data": log.description,
        "samples": {"train": len(log.train.labels), "test": len(log.test.labels)},
        "seeds": list(config.seed),
        "rows": rows,
        "runs": [vars(result) for result in results],
    }


def as_markdown(report: dict[str, Any], rows: Sequence[Sequence[str]]) -> str:
    """The report as a page.

    Args:
        report: what :func:`as_json` made.
        rows: what :func:`table` made.
    """
    lines = [
        "# DLRM: full, hashed and CAFE tables",
        "",
        f"Data: {report['data']}. {report['samples']['train']:,} training samples in order of "
        f"time, one epoch; {report['samples']['test']:,} test samples after them. "
        f"Seeds: {', '.join(map(str, report['seeds']))}.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(row) + " |" for row in rows[1:]),
        "",
        "Won back: share of hash's AUC loss against full tables. Embedding bytes: weights, "
        "sketches and maps as allocated, over all ranks.",
        "",
        "![AUC against embedding bytes](report.png)",
        "",
        f"`{report['command']}` at {report['commit']} on {report['machine']}",
        "",
    ]
    return "\n".join(lines)


def plot(path: Path, results: Sequence[Result], description: str) -> None:
    """AUC against embedding bytes, one line per kind.

    Args:
        path: PNG to write.
        results: of every kind, compression and seed.
        description: of the data, for the title.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    kinds = list(dict.fromkeys(result.kind for result in results))
    for kind in kinds:
        sizes = sorted({r.embedding_bytes for r in results if r.kind == kind})
        groups = [
            [r for r in results if r.kind == kind and r.embedding_bytes == size] for size in sizes
        ]
        aucs = [_mean(group, "auc") for group in groups]
        spreads = [_spread(group, "auc") or 0.0 for group in groups]
        axes.errorbar(
            [size / 2**20 for size in sizes], aucs, yerr=spreads, marker="o", capsize=3, label=kind
        )
        if kind == "full":
            axes.axhline(aucs[0], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("embedding MiB (weights, sketches, maps)")
    axes.set_ylabel("test AUC")
    axes.set_title(description, fontsize=8, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name first, so that a report is whole or not there."""
    partial = path.with_name(f".partial-{path.name}")
    write(partial)
    partial.replace(path)


def save(config: TrainConfig, log: ClickLog, results: Sequence[Result]) -> str:
    """Write ``report.json``, ``report.md`` and ``report.png``.

    Args:
        config: options of the run; ``config.out`` is the folder.
        log: the data set.
        results: of every kind, compression and seed.

    Returns:
        The comparison as text.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = table(results)
    report = as_json(config, log, results)
    _replace(out / "report.png", lambda path: plot(path, results, log.description))
    _replace(out / "report.md", lambda path: path.write_text(as_markdown(report, rows)))
    _replace(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=1)))
    return as_text(rows)
