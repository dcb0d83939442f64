"""Are the hit rates that ``torchrec-cafe profile`` predicts those of the caches? How fast is it?

Predicted against measured: FBGEMM's cache (simulated exactly) and our slot map's own planning, on
cache2k's ORM traces, a table for each type of object with 50,000 accesses and 1,000 ids or more,
and on generated Zipf traces; caches of 5 % to 70 % of the ids that hold the largest batch.
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from numpy.typing import NDArray

from benchmarks.cache_simulation import fbgemm_lru_hits, in_batches, slot_map_hits
from benchmarks.common import Row, print_rows, write_json, zipf_ids
from torchrec_cafe.profile import TraceOptions, profile_trace
from torchrec_cafe.profile.arrow import ArrowSource
from torchrec_cafe.profile.pieces import Bags, Samples
from torchrec_cafe.profile.sources import Columns, NpySource, Source

ORM = ("orm-busy.trace.xz", "orm-night.trace.xz")
TARGET_ERROR = 0.02
TARGET_SPEED = 5e6
SHARES = (0.05, 0.1, 0.2, 0.4, 0.7)
BATCH_SIZES = (512, 2048)
#: Memory of a table: the default, which holds all ids of the ORM tables, and one that samples.
MEMORIES = {"all ids": TraceOptions.table_bytes, "sampled": 1 << 18}
_TYPE_BITS = 27
_LEAST_ACCESSES, _LEAST_IDS = 50_000, 1_000


class Trace(NamedTuple):
    """One table's ids."""

    name: str
    ids: NDArray[np.int64]


class ArraySource:
    """A trace in memory."""

    def __init__(self, trace: Trace) -> None:
        self.name = trace.name
        self.num_samples: int | None = len(trace.ids)
        self._ids = trace.ids

    def parts(self) -> Iterator[Samples]:
        for begin in range(0, len(self._ids), 1 << 17):
            part = self._ids[begin : begin + (1 << 17)]
            yield Samples({"table": Bags(part)}, len(part))


def orm_tables(path: Path) -> list[Trace]:
    """The tables of an ORM trace that are large enough."""
    content = np.frombuffer(lzma.decompress(path.read_bytes()), dtype=">u4").astype(np.int64)
    kinds, objects = content >> _TYPE_BITS, content & ((1 << _TYPE_BITS) - 1)
    name = path.name.removesuffix(".trace.xz")
    traces = [Trace(f"{name} type {kind}", objects[kinds == kind]) for kind in np.unique(kinds)]
    return [
        trace
        for trace in traces
        if len(trace.ids) >= _LEAST_ACCESSES and len(np.unique(trace.ids)) >= _LEAST_IDS
    ]


def generated(quick: bool) -> list[Trace]:  # noqa: FBT001
    """Zipf traces, called that."""
    size, ids = (1_000_000, 200_000) if quick else (4_000_000, 2_000_000)
    return [
        Trace(f"generator Zipf {exponent}", zipf_ids(ids, size, exponent, seed=1).numpy())
        for exponent in (0.8, 1.05)
    ]


def compare(trace: Trace, batch_size: int, depth: int) -> Iterator[Row]:
    """Predicted against measured hit rates of a trace; the value is the error."""
    batches = in_batches(trace.ids, batch_size)
    largest = max(len(np.unique(batch)) for batch in batches)
    num_ids = len(np.unique(trace.ids))
    sizes = [int(share * num_ids) for share in SHARES if share * num_ids >= largest]
    lru = {rows: fbgemm_lru_hits(batches, rows) for rows in sizes}
    ahead = {rows: slot_map_hits(batches, rows, depth) for rows in sizes}
    for memory, table_bytes in MEMORIES.items():
        options = TraceOptions(batch_size=batch_size, depth=depth, table_bytes=table_bytes)
        predicted = profile_trace(ArraySource(trace), options).statistics["table"]
        for rows in sizes:
            where = f"{trace.name}/batch {batch_size}/{memory}/{rows} rows"
            yield _row(f"{where}/lru", predicted.lru_hit_rate(rows), lru[rows])
            if (measured := ahead[rows]) is not None:
                yield _row(f"{where}/lookahead", predicted.lookahead_hit_rate(rows), measured)


def _row(name: str, predicted: float, measured: float) -> Row:
    """Predicted hit rate; the baseline is the measured one."""
    row = Row(name, predicted, "hit rate", measured)
    row.target, row.met = TARGET_ERROR, abs(predicted - measured) <= TARGET_ERROR
    return row


def summary(rows: list[Row]) -> list[Row]:
    """Largest and mean absolute errors, by trace, memory and cache."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        trace, _, memory, _, cache = row.name.split("/")
        assert row.baseline is not None
        source = trace.split(" type ")[0].split(" Zipf ")[0]
        groups.setdefault(f"{source}/{memory}/{cache}", []).append(abs(row.value - row.baseline))
    found = []
    for name, errors in groups.items():
        for how, value in (("largest", max(errors)), ("mean", sum(errors) / len(errors))):
            row = Row(f"{name}/{how} error of {len(errors)}", value, "hit rate")
            row.target, row.met = TARGET_ERROR, value <= TARGET_ERROR
            found.append(row)
    return found


def speed(quick: bool) -> Iterator[Row]:  # noqa: FBT001
    """Ids a second on one thread, from npy and from parquet: four tables, four days."""
    size = 1_000_000 if quick else 8_000_000
    shapes = ((10_000_000, 1.05), (10_000_000, 0.8), (1_000_000, 1.0), (10_000, 1.05))
    ids = np.stack([zipf_ids(n, size, a, seed=2).numpy() for n, a in shapes], 1)
    with tempfile.TemporaryDirectory() as folder:
        npy, parquet = Path(folder) / "ids.npy", Path(folder) / "ids.parquet"
        np.save(npy, ids)
        table = pa.table({f"table_{number}": ids[:, number] for number in range(len(shapes))})
        pyarrow.parquet.write_table(table, parquet)
        columns = Columns(tables={})
        seconds: dict[str, list[float]] = {"npy": [], "parquet": []}
        used: dict[str, list[float]] = {"npy": [], "parquet": []}
        for _ in range(3):
            sources: dict[str, Source] = {
                "npy": NpySource([npy], columns),
                "parquet": ArrowSource([parquet], columns),
            }
            for name, source in sources.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                profile_trace(source, TraceOptions(), days=4)
                seconds[name].append(time.perf_counter() - start)
                used[name].append(time.process_time() - start_cpu)
    for name, times in seconds.items():
        rate = ids.size / sorted(times)[1]
        yield Row(f"speed/{name}, one thread", rate, "ids/s", target=TARGET_SPEED)
        rate = ids.size / sorted(used[name])[1]
        yield Row(f"speed/{name}, per second of the core", rate, "ids/s", target=TARGET_SPEED)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="folder with orm-*.trace.xz (none: generated)")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--speed-only", action="store_true", help="no hit rates")
    parser.add_argument("--json", default="", help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    traces = [] if args.speed_only else generated(args.quick)
    for name in ORM if args.traces else ():
        traces += orm_tables(args.traces / name)
    rows: list[Row] = []
    for trace in traces:
        for batch_size in BATCH_SIZES:
            rows += compare(trace, batch_size, args.depth)
    totals = [*summary(rows), *speed(args.quick)]
    print_rows(totals)
    print("\nbeyond the target:")
    print_rows([row for row in rows if not row.met])
    write_json(args.json, "profile_traces", [*totals, *rows])


if __name__ == "__main__":
    main()
