"""What a run leaves behind: a table, a JSON file, a page of Markdown and plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from examples.dlrm import plots
from examples.dlrm.config import UNCOMPRESSED_KINDS, TrainConfig
from examples.dlrm.data import ClickLog
from examples.dlrm.loop import Case, Result
from examples.dlrm.scalars import read_scalars, scalars_folder
from examples.dlrm.step_parts import PURPOSES, by_purpose
from torchrec_cafe.config.text import as_text, human_bytes

_COLUMNS = ("tables", "AUC", "won back", "log-loss", "NE", "embedding bytes", "samples/s")
_METRICS = {
    "auc": "",
    "log_loss": "nats",
    "normalized_entropy": "",
    "embedding_bytes": "bytes",
    "samples_per_second": "samples/s",
}


def _names(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by name of their kind, ``hash`` or, with several compressions, ``hash@100x``."""
    compressed = [result for result in results if result.kind not in UNCOMPRESSED_KINDS]
    several = len({result.compression for result in compressed}) > 1
    groups: dict[str, list[Result]] = {}
    for result in results:
        plain = result.kind in UNCOMPRESSED_KINDS or not several
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
                f"{_mean(group, 'normalized_entropy'):.4f}",
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


def memory_table(results: Sequence[Result]) -> list[list[str]]:
    """What the bytes are for as rows of text, the header first.

    Args:
        results: of every kind, compression and seed.
    """
    parts = {"shared": "rows", "hot": "hot rows", "sketch": "sketch", "map": "maps"}
    rows = [["tables", *parts.values(), "all, as planned"]]
    for name, (result, *_) in _names(results).items():
        memory = [result.memory[f"{part}_bytes"] for part in parts]
        total = sum(memory)
        shares = [f"{human_bytes(size)} ({size / total:.0%})" if size else "" for size in memory]
        rows.append([name, *shares, human_bytes(total)])
    return rows


def step_table(results: Sequence[Result]) -> list[list[str]]:
    """Where a step's time goes, in milliseconds, as rows of text, the header first.

    Args:
        results: of every kind, compression and seed; the first of each that was taken apart counts.
    """
    taken = {name: group[0] for name, group in _names(results).items() if group[0].step_parts}
    rows = [["tables", *PURPOSES, "sum"]]
    for name, result in taken.items():
        purposes = by_purpose(result.step_parts)
        values = [*purposes.values(), sum(purposes.values())]
        rows.append([name, *(f"{value:.2f}" for value in values)])
    return rows


def as_json(
    config: TrainConfig, log: ClickLog, results: Sequence[Result], program: str = "train"
) -> dict[str, Any]:
    """The report in the form that every benchmark of this project writes.

    Args:
        config: options of the run.
        log: the data set.
        results: of every kind, compression and seed.
        program: module of ``examples.dlrm`` that was run.
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
        "command": " ".join([f"python -m examples.dlrm.{program}", *sys.argv[1:]]),
        "machine": machine(),
        "data": log.description,
        "samples": {
            "train": len(log.train),
            "validation": len(log.validation) if log.validation is not None else 0,
            "test": len(log.test),
        },
        "epochs": config.epochs,
        "seeds": list(config.seed),
        "rows": rows,
        "runs": [vars(result) for result in results],
    }


def as_markdown(report: dict[str, Any], results: Sequence[Result], drawn: Set[str]) -> str:
    """The report as a page.

    Args:
        report: what :func:`as_json` made.
        results: of every kind, compression and seed.
        drawn: file names of the plots that there are.
    """
    samples, epochs = report["samples"], report["epochs"]
    held_out = f"{samples['validation']:,} validation and " if samples["validation"] else ""
    lines = [
        "# DLRM: ways of keeping its tables",
        "",
        f"Data: {report['data']}. {samples['train']:,} training samples in order of time, "
        f"{'one epoch' if epochs == 1 else f'{epochs} epochs'}; {held_out}{samples['test']:,} test "
        f"samples after them. Seeds: {', '.join(map(str, report['seeds']))}. Tested: "
        f"{_tested(results)}.",
        "",
        *_as_table(table(results)),
        "",
        "Won back: share of hash's AUC loss against full tables. NE: log-loss over that of "
        "predicting the mean label. Embedding bytes: weights, sketches and maps as allocated, over "
        "all ranks.",
        "",
        "![AUC against embedding bytes](report.png)",
        "",
        "## What the bytes are for",
        "",
        *_as_table(memory_table(results)),
        "",
    ]
    if "hot_share.png" in drawn:
        lines += ["## Hot rows over time", "", "![Hot share and promotions](hot_share.png)", ""]
    if "step_time.png" in drawn:
        lines += [
            "## Where a training step's time goes",
            "",
            "![Milliseconds of a step by part](step_time.png)",
            "",
            *_as_table(step_table(results)),
            "",
            "Milliseconds of the host under the profiler, which slows it down; rank 0.",
            "",
        ]
    return "\n".join(
        [*lines, f"`{report['command']}` at {report['commit']} on {report['machine']}\n"]
    )


def _tested(results: Sequence[Result]) -> str:
    """Which states were tested."""
    if all(result.tested == "last" for result in results):
        return "the last state of each training"
    states = {"last": "its last", "best": "the best of its validations"}
    return ", ".join(
        f"{name} {states[result.tested]} (step {result.tested_step:,}"
        + (f", seed {result.seed})" if len(group) > 1 else ")")
        for name, group in _names(results).items()
        for result in group
    )


def _as_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _traces(config: TrainConfig, results: Sequence[Result]) -> list[plots.Trace]:
    """What TensorBoard shows of the hot rows of each training."""
    found = []
    for name, group in _names(results).items():
        for result in group:
            label = Case(result.kind, result.compression, result.seed).label(config)
            folder = scalars_folder(config.out, label)
            shares, moves = (read_scalars(folder, s) for s in ("hot_share", "promoted"))
            for pool in shares:
                found.append(
                    plots.Trace(
                        name if len(shares) == 1 else f"{name}, {pool}",
                        result.kind,
                        shares[pool],
                        moves.get(pool, []),
                    )
                )
    return found


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name first, so that a report is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    write(partial)
    partial.replace(path)


def _replace_json(path: Path, report: dict[str, Any]) -> None:
    _replace(path, lambda partial: partial.write_text(json.dumps(report, indent=1)))


def save(config: TrainConfig, log: ClickLog, results: Sequence[Result]) -> str:
    """Write ``report.json``, ``report.md`` and its plots.

    Args:
        config: options of the run; ``config.out`` is the folder.
        log: the data set.
        results: of every kind, compression and seed.

    Returns:
        The comparison as text.
    """
    out = Path(config.out)
    report = as_json(config, log, results)
    pictures = {
        "report.png": plots.auc_by_bytes(results, log.description),
        "hot_share.png": plots.hot_share(_traces(config, results)),
        "step_time.png": plots.step_time(
            {
                name: by_purpose(group[0].step_parts)
                for name, group in _names(results).items()
                if group[0].step_parts
            }
        ),
    }
    for name, picture in pictures.items():
        if picture is None:
            (out / name).unlink(missing_ok=True)  # of an earlier run
        else:
            _replace(out / name, picture)
    drawn = {name for name, picture in pictures.items() if picture is not None}
    _replace(out / "report.md", lambda path: path.write_text(as_markdown(report, results, drawn)))
    _replace_json(out / "report.json", report)
    return as_text(table(results))


def save_evaluation(config: TrainConfig, log: ClickLog, results: Sequence[Result]) -> str:
    """Write ``evaluation.json``, of the form of ``report.json``.

    Args:
        config: options of the run; ``config.out`` is the folder.
        log: the data set.
        results: of every kind, compression and seed.

    Returns:
        The comparison as text.
    """
    _replace_json(Path(config.out) / "evaluation.json", as_json(config, log, results, "evaluate"))
    return as_text(table(results))
