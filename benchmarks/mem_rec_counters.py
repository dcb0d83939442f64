"""Instructions and cache misses of an id's lookup in full tables and in MEM-REC's, by callgrind.

``python -m benchmarks.mem_rec_counters`` runs the forward pass of :mod:`benchmarks.mem_rec` for
each kind of table in a process under valgrind, which counts what it executes and simulates a first
and a last-level cache of this machine's sizes. Counts do not depend on what else the machine does.
They are of AVX2 code, the most that valgrind has, and a line that was prefetched counts as a miss
of the load that follows: they say what has to be brought, not how long one waits for it.
"""

from __future__ import annotations

import argparse
import os
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
    TOKEN_TABLES,
    Batch,
    Case,
    FullTables,
    mem_rec,
    token_name,
)

#: of the last-level cache: bytes, ways, line
LAST_LEVEL = (32 << 20, 16, 64)
FULL = "full"
#: what is shown of callgrind's events
EVENTS = {
    "instructions": ("Ir",),
    "first-level misses": ("D1mr", "D1mw"),
    "last-level misses": ("DLmr", "DLmw"),
}


def count(lookup: Callable[[Batch], Tensor], batches: list[Batch]) -> None:
    """Let callgrind count the last of some batches, after the others have filled the caches.

    Args:
        lookup: the tables.
        batches: one alike in size is looked up first, without valgrind's simulation.
    """
    with torch.no_grad():
        lookup(batches[0])
        _control("--instr=on")
        for batch in batches[:-1]:
            lookup(batch)
        _control("--zero")
        lookup(batches[-1])
        _control("--dump")
        _control("--instr=off")


def _control(what: str) -> None:
    subprocess.run(
        ["callgrind_control", what, str(os.getpid())], check=True, stdout=subprocess.DEVNULL
    )


def tables(name: str, rows: int) -> Callable[[Batch], Tensor]:
    """The tables of a name.

    Args:
        name: :data:`FULL`, or of a token table.
        rows: of each full table.
    """
    if name == FULL:
        return FullTables(rows)
    (found,) = [sizes for sizes in TOKEN_TABLES if token_name(*sizes) == name]
    bags = mem_rec(rows, *found)
    return lambda batch: bags(*batch)


def events(folder: Path) -> dict[str, int]:
    """What callgrind has counted up to the dump that was asked for, of its events by name.

    Args:
        folder: of its files; another one holds what came after.
    """
    (dump,) = folder.glob("callgrind.out.*.1")
    lines = dump.read_text().splitlines()
    of = {line.split(": ", 1)[0]: line.split(": ", 1)[1].split() for line in lines if ": " in line}
    return dict(zip(of["events"], map(int, of["summary"]), strict=False))


def measure(name: str, arguments: list[str], num_ids: int) -> list[Row]:
    """The figures of one kind of table.

    Args:
        name: of the tables.
        arguments: of the process that looks up.
        num_ids: of the batch that is counted.
    """
    size, ways, line = LAST_LEVEL
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--cache-sim=yes", "--instr-atstart=no"]
        command += [f"--LL={size},{ways},{line}", f"--callgrind-out-file={folder}/callgrind.out.%p"]
        command += [sys.executable, "-m", "benchmarks.mem_rec_counters", "--tables", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"error: valgrind failed:\n{done.stderr[-3000:]}")
        counted = events(Path(folder))
    return [
        Row(f"{name}/{what}", sum(counted[event] for event in of) / num_ids, "an id")
        for what, of in EVENTS.items()
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="of the full tables together")
    parser.add_argument("--pooling", type=int, default=120, help="ids of a bag")
    parser.add_argument("--samples", type=int, default=256, help="of a batch (default: 256)")
    parser.add_argument("--only", default="", help="names of tables, by |; all by default")
    parser.add_argument("--json", default="", help="where to write the figures")
    parser.add_argument("--tables", default="", help="internal: what this process looks up in")
    options = parser.parse_args()
    rows = round(options.gib * 2**30 / (NUM_TABLES * DIM * 4))
    if options.tables:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        batches = Case(options.pooling, 0.0, backward=False).batches(rows, 3, options.samples)
        count(tables(options.tables, rows), batches)
        return
    names = [FULL, *(token_name(*sizes) for sizes in TOKEN_TABLES)]
    if options.only:
        names = [name for name in names if name in options.only.split("|")]
    given = ["--gib", str(options.gib), "--pooling", str(options.pooling)]
    given += ["--samples", str(options.samples)]
    found: list[Row] = []
    for name in tqdm(names, desc="tables"):
        found += measure(name, given, NUM_TABLES * options.samples * options.pooling)
    print_rows(found)
    write_json(options.json, "mem_rec_counters", found)


if __name__ == "__main__":
    main()
