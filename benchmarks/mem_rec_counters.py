"""What bounds pooled lookups: instructions and cache misses of an id, simulated by cachegrind.

``python -m benchmarks.mem_rec_counters`` runs the forward pass of :mod:`benchmarks.mem_rec` (120
uniform ids a bag, 8 GiB of full tables against MEM-REC, here with 512 samples) under ``valgrind
--tool=cachegrind`` with the caches of the machine given, on one thread, for one batch and for two:
the difference is what a batch costs once the caches are warm. For machines whose own counters
cannot be read.

Cachegrind has two levels, the first and the last, fetches nothing ahead and runs AVX2 at most.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import Row, print_rows, write_json
from benchmarks.mem_rec import (
    DIM,
    NUM_TABLES,
    POOLING,
    TOKEN_TABLES,
    Batch,
    Case,
    FullTables,
    lookup_name,
    mem_rec,
)

FULL = "full"
SAMPLES = 512
EVENTS = {
    "instructions": ("Ir",),
    "first-level misses": ("D1mr", "D1mw"),
    "last-level misses": ("DLmr", "DLmw"),
}
_CASE = Case(POOLING[-1], exponent=0.0, backward=False)


def _lookup(name: str, rows: int) -> Callable[[Batch], Tensor]:
    """What to look up in, of tables with so many rows."""
    if name == FULL:
        return FullTables(rows, fill=None)
    ((token_rows, precision),) = (kept for kept in TOKEN_TABLES if lookup_name(*kept) == name)
    bags = mem_rec(rows, token_rows, precision)
    return lambda batch: bags(*batch)


def _batches(rows: int) -> list[Batch]:
    """Two batches, of fewer samples than are timed: what is simulated takes its time."""
    size = SAMPLES * _CASE.pooling
    offsets = torch.arange(NUM_TABLES * SAMPLES + 1) * _CASE.pooling
    return [
        (ids.view(NUM_TABLES, -1)[:, :size].reshape(-1), offsets)
        for ids, _ in _CASE.batches(rows, 2)
    ]


def _child(name: str, gib: float, batches: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = round(gib * 2**30 / (NUM_TABLES * DIM * 4))
    lookup = _lookup(name, rows)
    with torch.no_grad():
        for batch in _batches(rows)[:batches]:
            lookup(batch)


def _count(name: str, gib: float, batches: int, caches: list[str]) -> dict[str, int]:
    """Events of a process that looks up so many batches."""
    with tempfile.TemporaryDirectory(prefix="cafe-cachegrind-") as folder:
        out = Path(folder) / "out"
        command = [
            "valgrind",
            "--tool=cachegrind",
            "--cache-sim=yes",
            f"--cachegrind-out-file={out}",
        ]
        command += [*caches, sys.executable, "-m", "benchmarks.mem_rec_counters"]
        command += ["--child", name, "--batches", str(batches), "--gib", str(gib)]
        subprocess.run(command, check=True, capture_output=True)
        text = out.read_text()
    (events,), (summary,) = (
        re.findall(rf"^{key}: (.*)$", text, re.MULTILINE) for key in ("events", "summary")
    )
    return dict(zip(events.split(), map(int, summary.split()), strict=True))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gib", type=float, default=8.0, help="of the full tables together (default: 8)")
    add("--d1", default="49152,12,64", help="first-level cache: bytes, ways, bytes of a line")
    add("--last", default="33554432,16,64", help="last-level cache, likewise")
    add("--json", default="", help="where to write the figures")
    add("--child", default="", help="internal: what to look up in")
    add("--batches", type=int, default=0, help="internal: how many batches")
    options = parser.parse_args()
    if options.child:
        _child(options.child, options.gib, options.batches)
        return
    if shutil.which("valgrind") is None:
        sys.exit("error: valgrind not found; install it")
    caches = [f"--D1={options.d1}", f"--LL={options.last}"]
    ids = SAMPLES * NUM_TABLES * _CASE.pooling
    rows: list[Row] = []
    for name in tqdm([FULL, *(lookup_name(*kept) for kept in TOKEN_TABLES)], desc="tables"):
        few, many = (_count(name, options.gib, batches, caches) for batches in (1, 2))
        for title, events in EVENTS.items():
            per_id = sum(many[event] - few[event] for event in events) / ids
            rows.append(Row(f"{_CASE}/{name}/{title}", per_id, "an id"))
    print_rows(rows)
    write_json(options.json, "mem_rec_counters", rows)


if __name__ == "__main__":
    main()
