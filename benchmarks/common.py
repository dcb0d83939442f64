"""What the benchmarks share: streams of ids, interleaved timing, and the report they write."""

from __future__ import annotations

import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.dlrm.report import command_output, machine
from torchrec_cafe.config.text import as_text

NATIVE = Path(__file__).parent / "native"


@dataclass
class Row:
    """One figure.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: its unit.
        baseline: what it is compared with, in the same unit.
        target: what it has to reach.
        met: whether it does.
    """

    name: str
    value: float
    unit: str
    baseline: float | None = None
    target: float | None = None
    met: bool | None = None

    def __post_init__(self) -> None:
        """Judge the figure."""
        if self.target is not None:
            self.met = self.value >= self.target


def zipf_ids(num_ids: int, size: int, exponent: float, seed: int) -> torch.Tensor:
    """A stream of ids with Zipf-distributed popularity; the popular ids are anywhere.

    Args:
        num_ids: ids are in [0, num_ids).
        size: length of the stream.
        exponent: of the distribution; 0 is uniform.
        seed: of the stream.

    Returns:
        int64 ``[size]``.
    """
    random = np.random.default_rng(seed)
    if exponent == 0:
        return torch.from_numpy(random.integers(0, num_ids, size))
    ranks = zipf_ranks(num_ids, size, exponent, random)
    return torch.from_numpy(random.permutation(num_ids)[ranks])


def zipf_ranks(
    num_ids: int, size: int, exponent: float, random: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ranks in [0, num_ids), each as probable as ``(rank + 1)**-exponent``."""
    cumulated = np.cumsum(np.arange(1, num_ids + 1, dtype=np.float64) ** -exponent)
    parts = [
        np.searchsorted(cumulated, random.random(min(1 << 20, size - start)) * cumulated[-1])
        for start in range(0, size, 1 << 20)
    ]
    return np.concatenate(parts)


def compile_native(source: Path, *flags: str) -> ctypes.CDLL:
    """Compile a C++ file with the machine's own instructions and load it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("error: no C++ compiler: install g++ 12 or later")
    folder = Path(tempfile.mkdtemp(prefix="cafe-benchmark-"))
    library = folder / f"{source.stem}.so"
    options = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", *flags]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded


def interleaved(jobs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each job over ``rounds`` rounds in which all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table_of_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Figures as rows of text, the header first.

    Args:
        rows: with the attributes of :class:`Row`.
    """

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"

    met = {None: "", True: "yes", False: "NO"}
    table = [["figure", "value", "unit", "baseline", "target", "met"]]
    numbers = ("baseline", "target")
    table += [
        [row["name"], number(row["value"]), row["unit"], *(number(row[n]) for n in numbers)]
        + [met[row["met"]]]
        for row in rows
    ]
    return table


def print_rows(rows: Sequence[Row]) -> None:
    """Print the figures as a table."""
    print(as_text(table_of_rows([vars(row) for row in rows])))


def write_json(path: str, benchmark: str, rows: Sequence[Row]) -> None:
    """Write the figures in the form of every benchmark of this project; no path, no file."""
    if not path:
        return
    report = {
        "benchmark": benchmark,
        "commit": command_output("git", "describe", "--always", "--dirty"),
        "command": " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
