"""Training speed with look-ahead tables whose rows are in files or in memory.

``python -m benchmarks.lookahead`` trains TorchRec's DLRM, in processes that take turns and sleep
otherwise, with the same batches:

* ``dram``: TorchRec's own tables, all in memory, under ``TrainPipelineSparseDist``;
* ``mapped``: FBGEMM's TBE over a memory-mapped file, the kernel's page cache in charge;
* ``file``: ``Lookahead(path=...)``, without look-ahead (depth 0) and with 1 to 8 batches;
* ``memory``: ``Lookahead()`` over host memory, depths 0 and 4.

``mapped`` and ``file`` run under a limit of their memory, page cache included (a control group,
which takes root): as much for the table as the scratchpad takes and the same again, and 128 MiB
for the libraries' code. With ``--quick`` tables are too small for that, and fit the page cache. The
figure of
a case is the median over the rounds of the ratio of samples per second.

Ids are Zipf-distributed and bounded, the popular ones anywhere in the table; no batch comes twice
in a run of the usual length. Where less than the target is reached, the figures say what the run
is bound by: rows moved per second against the random reads that the disk can do, and how much of
the moving was hidden.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from benchmarks.common import Row, print_rows, write_json
from benchmarks.lookahead_process import LEAD, Case, serve
from torchrec_cafe.ops import read_rows

MLPERF = (1024, 1024, 512, 256)
CASES = {
    "zipf 1.05": Case(26, 230_000, 128, 2048, 1, 1.05, 0.05, MLPERF),
    "zipf 0.8": Case(26, 230_000, 128, 2048, 1, 0.8, 0.05, MLPERF),
}
QUICK_CASES = {"zipf 1.05": Case(8, 40_000, 64, 512, 1, 1.05, 0.05, (256, 128))}
DEPTHS = (1, 2, 4, 8)
MAIN_DEPTH = 4
#: ways to keep the tables, and the depths that each is run with
WAYS = {"dram": (0,), "mapped": (0,), "file": (0, *DEPTHS), "memory": (0, MAIN_DEPTH)}
#: bytes of page cache for the code that runs
LIBRARIES = 1 << 27
#: least samples per second of a way that looks ahead, over those of another
TARGETS = {
    "file": {"dram": 0.9, "mapped": 2.8, "file, depth 0": 2.0},
    "memory": {"dram": 0.9, "memory, depth 0": None},
}


@dataclass
class _Process:
    """A way to keep the tables, and the depths that it is run with."""

    way: str
    depths: tuple[int, ...]
    connection: Connection
    process: BaseProcess

    def turn(self, depth: int, steps: int) -> tuple[list[float], dict[str, float]]:
        """Seconds of each step, and what the scratchpad has done."""
        self.connection.send((depth, steps))
        return self.receive()

    def end(self) -> None:
        """Let the process end."""
        self.connection.send(None)
        self.process.join()

    def receive(self) -> tuple[list[float], dict[str, float]]:
        """What the process sends, or the end of the run if it has died."""
        while not self.connection.poll(1):
            if not self.process.is_alive():
                sys.exit(f"error: the process of {self.way} has ended")
        return self.connection.recv()


def _start(case: Case, way: str, depths: tuple[int, ...], folder: Path, count: int) -> _Process:
    page_cache = 0
    if way in ("mapped", "file") and case.table_bytes > 10 * LIBRARIES:
        # The scratchpad of `file` is not page cache.
        page_cache = LIBRARIES + case.scratchpad_bytes * (2 if way == "mapped" else 1)
    ours, theirs = mp.Pipe()
    arguments = (theirs, case, way, folder / way, count, page_cache)
    process = mp.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    process.start()
    started = _Process(way, depths, ours, process)
    started.receive()
    return started


def random_reads(folder: Path, row_bytes: int, threads: int) -> float:
    """Random reads of rows per second that the disk can do, the page cache empty."""
    path = folder / "reads"
    size, count = 1 << 30, 20_000
    with path.open("wb+") as file:
        for _ in range(size >> 24):
            file.write(os.urandom(1 << 24))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        rows = torch.randint(0, size // row_bytes, (count,))
        into = torch.empty(count, row_bytes // 4)
        start = time.perf_counter()
        read_rows(file.fileno(), rows, into, torch.arange(count), num_threads=threads)
        seconds = time.perf_counter() - start
    path.unlink()
    return count / seconds


def measure(
    name: str, case: Case, folder: Path, effort: tuple[int, int], ways: Sequence[str]
) -> tuple[list[Row], dict[str, float]]:
    """The figures of a case, and samples per second by way and depth.

    Args:
        name: of the case.
        case: what is trained.
        folder: where files lie.
        effort: rounds of turns, and steps of a turn.
        ways: of :data:`WAYS`.
    """
    rounds, steps = effort
    depths = {way: WAYS[way] for way in ways}
    most = max(sum(of) + len(of) * (LEAD + steps) for of in depths.values())
    count = most * (rounds + 1)
    processes = [
        _start(case, way, of, folder, count)
        for way, of in tqdm(depths.items(), desc=f"{name}: set-up", leave=False)
    ]
    speeds: dict[str, list[float]] = {}
    counted: dict[str, dict[str, float]] = {}
    for number in tqdm(range(rounds + 1), desc=f"{name}: rounds", leave=False):
        for process in processes:
            for depth in process.depths:
                os.sync()  # nobody pays for what another has left to be written
                seconds, statistics_ = process.turn(depth, steps)
                if number == 0:
                    continue  # caches fill
                way = f"{process.way}, depth {depth}" if len(process.depths) > 1 else process.way
                speeds.setdefault(way, []).append(case.batch * len(seconds) / sum(seconds))
                total = counted.setdefault(way, {})
                for key, value in statistics_.items():
                    total[key] = total.get(key, 0.0) + value
    for process in processes:
        process.end()
    rows = _judge(name, case, speeds)
    for way, total in counted.items():
        rows += _moved(f"{name}/{way}", total)
    return rows, {way: statistics.median(values) for way, values in speeds.items()}


def _judge(name: str, case: Case, speeds: Mapping[str, Sequence[float]]) -> list[Row]:
    rows = [
        Row(f"{name}/{way}", statistics.median(values), "samples/s")
        for way, values in speeds.items()
    ]
    for way, targets in TARGETS.items():
        ours = speeds.get(f"{way}, depth {MAIN_DEPTH}")
        for other, target in targets.items():
            if ours is None or other not in speeds:
                continue
            ratios = [mine / theirs for mine, theirs in zip(ours, speeds[other], strict=True)]
            ratio = statistics.median(ratios)
            rows.append(Row(f"{name}/{way} over {other}", ratio, "x", 1.0, target))
    return rows


def _moved(name: str, total: Mapping[str, float]) -> list[Row]:
    """What was moved, per batch."""
    if not total:
        return []
    batches = total["batches"]
    moving = max(total["seconds_moving"], 1e-9)
    hidden = max(0.0, 1 - total["seconds_exposed"] / moving)
    return [
        Row(f"{name}/rows", total["rows"] / batches, "a batch"),
        Row(f"{name}/hits", total["hits"] / max(1.0, total["rows"]), "of rows"),
        Row(f"{name}/critical misses", total["critical_misses"] / batches, "a batch"),
        Row(f"{name}/bytes in", total["bytes_in"] / batches, "a batch"),
        Row(f"{name}/bytes out", total["bytes_out"] / batches, "a batch"),
        Row(f"{name}/moving", 1e3 * total["seconds_moving"] / batches, "ms a batch"),
        Row(f"{name}/exposed", 1e3 * total["seconds_exposed"] / batches, "ms a batch"),
        Row(f"{name}/hidden", hidden, "of the time moving"),
    ]


def _plot(path: str, speeds: Mapping[str, Mapping[str, float]]) -> None:
    """Samples per second over the depth, relative to all in memory."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for name, of in speeds.items():
        depths = [0, *DEPTHS]
        ratios = [of[f"file, depth {depth}"] / of["dram"] for depth in depths]
        (line,) = axes.plot(depths, ratios, marker="o", label=f"{name}: look-ahead, file")
        axes.axhline(
            of["mapped"] / of["dram"], color=line.get_color(), linestyle=":", label=f"{name}: mmap"
        )
    axes.axhline(TARGETS["file"]["dram"], color="red", linestyle="--", label="target")
    axes.set(
        xlabel="batches looked ahead",
        ylabel="samples/s, all in memory = 1",
        ylim=(0, 1.1),
        xticks=[0, *DEPTHS],
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables: within a minute")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--cases", default="", help="comma-separated; all by default")
    parser.add_argument("--ways", default=",".join(WAYS), help="what to compare; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--folder", default="", help="where files lie; a local disk")
    parser.add_argument("--json", default="", help="where to write the figures")
    parser.add_argument("--plot", default="", help="where to draw the depths")
    options = parser.parse_args()
    cases = QUICK_CASES if options.quick else CASES
    if options.cases:
        cases = {name: cases[name] for name in options.cases.split(",")}
    rounds = 2 if options.quick else options.rounds
    rows: list[Row] = []
    speeds = {}
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        for name, case in cases.items():
            of_case, speeds[name] = measure(
                name, case, Path(folder), (rounds, options.steps), options.ways.split(",")
            )
            rows += of_case
        for threads in (1, 16):
            reads = random_reads(Path(folder), 512, threads)
            rows.append(
                Row(f"disk/random reads of 512 bytes, {threads} threads", reads, "a second")
            )
    print_rows(rows)
    write_json(options.json, "lookahead", rows)
    if options.plot and options.ways == parser.get_default("ways"):
        _plot(options.plot, speeds)


if __name__ == "__main__":
    main()
