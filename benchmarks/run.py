"""Everything there is to measure on a GPU, in one go of a few minutes.

``python -m benchmarks.run --device cuda --out FOLDER`` runs the benchmarks one after the other,
each in a process of its own: the operators against the bandwidth of a copy
(:mod:`benchmarks.kernels`), training steps with CAFE and MEM-REC tables against hashed and full
ones (:mod:`benchmarks.train_step`), look-ahead tables against FBGEMM's caching of unified memory
(:mod:`benchmarks.lookahead_cuda`). It writes ``report.md`` and ``report.json``. What is finished
lies in the folder and is not measured again, so that a run that had to end can go on; after
``--minutes`` what runs is ended, and nothing is begun. ``--device cpu --quick`` says that all this
works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import table_of_rows
from benchmarks.quality import hardware
from examples.dlrm.report import command_output, machine
from torchrec_cafe.config.text import as_text

KINDS = "hash,cafe,cafe_without_factors,mem_rec,full"
#: minutes of the look-ahead benchmark, and what it needs besides to end
LOOKAHEAD_MINUTES = 3.0
#: cases of training steps, the most telling first
CASES = ("64:2048", "64:16384", "64:2048:20", "16:2048", "128:2048", "16:16384", "128:16384")


@dataclass(frozen=True)
class Part:
    """A benchmark of the run.

    Attributes:
        name: of its files.
        command: its module and arguments.
        minutes: it is ended after so many.
    """

    name: str
    command: tuple[str, ...]
    minutes: float


def parts(device: str, out: Path, *, quick: bool) -> list[Part]:
    """The benchmarks, those first that the rest can be judged by.

    Args:
        device: ``cpu`` or ``cuda``.
        out: folder of the files.
        quick: small tables.
    """
    common = ("--device", device, *["--quick"] * quick)
    lookahead = ["lookahead_cuda", *common, "--parts", str(out / "lookahead.parts")]
    lookahead += ["--minutes", str(0.5 if quick else LOOKAHEAD_MINUTES)]
    if quick:
        lookahead += ["--rounds", "1", "--steps", "2", "--batches", "4"]
    steps = [
        Part(
            f"train_step_{case.replace(':', 'x')}",
            ("train_step", *common, "--kinds", KINDS, "--cases", case),
            2.0,
        )
        for case in (("16:2048",) if quick else CASES)
    ]
    kernels = Part("kernels", ("kernels", *common), 2.0)
    return [kernels, *steps[:3], Part("lookahead", tuple(lookahead), 5.0), *steps[3:]]


class Runner:
    """Runs benchmarks until the time is up.

    Args:
        out: folder of what is finished, a JSON file and a log for each.
        minutes: after which nothing goes on.
    """

    def __init__(self, out: Path, minutes: float) -> None:
        """Start the clock; see the class."""
        self._out = out
        self._end = time.monotonic() + 60 * minutes
        #: what has no figures, and why
        self.missing: dict[str, str] = {}

    def run(self, part: Part) -> None:
        """Run a benchmark, if it has not finished before.

        Args:
            part: the benchmark.
        """
        path = self._out / f"{part.name}.json"
        if path.is_file():
            return
        left = min(60 * part.minutes, self._end - time.monotonic())
        if left <= 0:
            self.missing[part.name] = "not begun: the time was up"
            return
        log = self._out / f"{part.name}.log"
        partial = path.with_suffix(".partial")
        module, *arguments = part.command
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json", str(partial)]
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, timeout=left, check=False
                )
            except subprocess.TimeoutExpired:
                self.missing[part.name] = f"ended after {left:.0f} s"
                return
        if done.returncode == 0:
            partial.replace(path)
        else:
            self.missing[part.name] = f"failed with status {done.returncode}, see {log.name}"


def collect(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The reports of the benchmarks that have finished.

    Args:
        out: folder of their files.
        names: of all of them.
    """
    paths = [out / f"{name}.json" for name in names]
    return [json.loads(path.read_text()) | {"part": path.stem} for path in paths if path.is_file()]


def as_markdown(found: Sequence[dict[str, Any]], missing: dict[str, str], device: str) -> str:
    """The figures as a page.

    Args:
        found: what :func:`collect` gives.
        missing: what has no figures, and why.
        device: of the run.
    """
    lines = [f"# All benchmarks on {device}", "", f"{machine()}.", ""]
    if missing:
        lines += ["Without figures:", ""]
        lines += [f"* {name}: {reason}" for name, reason in missing.items()] + [""]
    for part in found:
        header, *rows = table_of_rows(part["rows"])
        lines += [f"## {part['part']}", "", "| " + " | ".join(header) + " |"]
        lines += ["|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows), ""]
        lines += [f"`{part['command']}` at {part['commit']} on {part['machine']}", ""]
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small tables, few rounds")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing goes on")
    parser.add_argument("--out", default="runs/benchmarks", help="folder of all files")
    parser.add_argument("--parts", default="", help="names of parts; all by default")
    parser.add_argument("--results", default="", help="folder for <device>_<hardware>_<date>.md")
    parser.add_argument("--hardware", default="", help="for that name; default: the processor's")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --quick tries the code without one")
    return options


def _wanted(options: argparse.Namespace) -> list[Part]:
    found = parts(options.device, Path(options.out), quick=options.quick)
    names = options.parts.split(",") if options.parts else [part.name for part in found]
    if unknown := sorted(set(names) - {part.name for part in found}):
        of = ", ".join(part.name for part in found)
        raise SystemExit(f"error: --parts must be of {of}, got {', '.join(unknown)}")
    return [part for part in found if part.name in names]


def _save(
    found: Sequence[dict[str, Any]], missing: dict[str, str], options: argparse.Namespace
) -> Path:
    """Write the report, here and among the results; where it lies."""
    stems = [Path(options.out) / "report"]
    if options.results:
        named = options.hardware or hardware(machine())
        day = date.today().isoformat()
        stems.append(Path(options.results) / f"{options.device}_{named}_{day}")
    whole = {
        "benchmark": "run",
        "commit": command_output("git", "describe", "--always", "--dirty"),
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "machine": machine(),
        "rows": [row for part in found for row in part["rows"]],
        "missing": missing,
    }
    for stem in stems:
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(f"{stem.name}.md").write_text(as_markdown(found, missing, options.device))
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    return stems[-1].with_name(f"{stems[-1].name}.md")


def main() -> None:
    """Run the command line; status 1 if a part has no figures."""
    options = _parse()
    wanted = _wanted(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(out, options.minutes)
    for part in tqdm(wanted, desc="benchmarks", unit="part"):
        runner.run(part)
    found = collect(out, [part.name for part in wanted])
    judged = [row for part in found for row in part["rows"] if row["target"] is not None]
    print(as_text(table_of_rows(judged)))
    for name, reason in runner.missing.items():
        print(f"{name}: {reason}")
    print(f"\nreport: {_save(found, runner.missing, options)}")
    sys.exit(bool(runner.missing))


if __name__ == "__main__":
    main()
