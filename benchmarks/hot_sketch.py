"""HotSketch: operations per second, and how many of the truly highest scores it finds.

``python -m benchmarks.hot_sketch`` checks the operators against their definition, then measures
them on one core and on two, beside the random reads of the same memory that bound them. With
``--released sketch.cpp`` (``ArtifactEvaluation/embeddings/sketch.cpp`` of
https://github.com/HugoZHL/CAFE) the paper's released sketch takes its turn in every round. Then it
measures recall on a drifting stream, see :mod:`benchmarks.hot_sketch_recall`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import NATIVE, Row, compile_native, interleaved, print_rows, write_json
from benchmarks.common import zipf_ids as stream_of
from benchmarks.hot_sketch_recall import measure_recall
from torchrec_cafe import ops
from torchrec_cafe.ops import HotRows, PoolRows, SketchState, reference

SHARDS = 64
#: of the released code's buffers, and so the batch at which the two are compared
BATCH = 8192
#: a step of a model: 32 features, 2048 samples
STEP = 65536
#: buckets and ids of the sketches measured: the paper's at 1000x on Criteo Kaggle, and a large one
SIZES = ((13_505, 8_400_000), (1_000_000, 33_800_000))
DISTRIBUTIONS = {"zipf": 1.05, "uniform": 0.0}


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what native code prints."""
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


class Released:
    """The paper's released sketch, as it is: 32-bit ids, id mod buckets, one thread."""

    def __init__(self, library: ctypes.CDLL, index: int, buckets: int) -> None:
        self._library, self._index = library, index
        with _quiet():
            library.init(buckets, 100, ctypes.c_double(0.99), index)

    def insert(self, ids: Tensor, importance: Tensor) -> None:
        """One batch of int32 ids."""
        pointers = ctypes.c_void_p(ids.data_ptr()), ctypes.c_void_p(importance.data_ptr())
        self._library.batch_insert_val(*pointers, ids.numel(), self._index)

    def query(self, ids: Tensor) -> None:
        """One batch of int32 ids."""
        self._library.batch_query(ctypes.c_void_p(ids.data_ptr()), ids.numel(), self._index)


@dataclass
class Case:
    """A stream, and a sketch that has seen it once."""

    buckets: int
    ids: Tensor
    importance: Tensor
    tables: Tensor
    state: SketchState

    @classmethod
    def make(cls, buckets: int, num_ids: int, exponent: float, size: int) -> Case:
        """Draw the stream, feed it to the sketch, and give its hot rows to the highest scores."""
        per_shard = buckets // SHARDS
        ids = stream_of(num_ids, size, exponent, seed=0)
        offsets, sizes = torch.tensor([0, size]), torch.tensor([num_ids])
        mixed = ops.mix_ids(ids, offsets, sizes, torch.zeros(1, dtype=torch.int64))
        columns = [num_ids, buckets, 0, 0, 0]
        state = SketchState.empty(shards=SHARDS, buckets=per_shard, hot_rows=per_shard)
        case = cls(buckets, mixed, torch.rand(size) + 0.5, torch.tensor([columns]), state)
        for keys, shards, importance in case.batches(BATCH):
            ops.observe(state, keys, shards, importance)
        ops.rebalance(state, torch.arange(SHARDS))
        return case

    @property
    def hot(self) -> HotRows:
        """Where a lookup finds the hot ids."""
        return HotRows(
            buckets=self.state.buckets,
            first_shard=0,
            num_shards=SHARDS,
            rows=PoolRows(offset=self.buckets, hot_rows_per_shard=self.state.owners.shape[1]),
        )

    def batches(self, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, shards and importance of each batch."""
        result = []
        for ids, importance in zip(self.ids.split(size), self.importance.split(size), strict=True):
            remapped = ops.remap(ids, torch.arange(ids.numel() + 1), self.tables, self.hot)
            result.append((remapped.keys, remapped.shards, importance))
        return result

    def observe_job(self, size: int, threads: int) -> Callable[[], None]:
        """Feed the whole stream to the sketch."""
        batches = self.batches(size)

        def run() -> None:
            torch.set_num_threads(threads)
            for keys, shards, importance in batches:
                ops.observe(self.state, keys, shards, importance)

        return run

    def remap_job(self, size: int, threads: int) -> Callable[[], None]:
        """Look up the whole stream, one id a bag."""
        batches = [(ids, torch.arange(ids.numel() + 1)) for ids in self.ids.split(size)]
        hot = self.hot

        def run() -> None:
            torch.set_num_threads(threads)
            for ids, offsets in batches:
                ops.remap(ids, offsets, self.tables, hot)

        return run

    def rebalance_job(self) -> Callable[[], None]:
        """The re-assignments of one training step: a sixteenth of the shards."""
        selected = torch.arange(0, SHARDS, 16)

        def run() -> None:
            torch.set_num_threads(1)
            ops.rebalance(self.state, selected, hysteresis=0.1)

        return run


def _floor_jobs(library: ctypes.CDLL, buckets: int, size: int) -> dict[str, Callable[[], None]]:
    lines = SketchState.empty(shards=1, buckets=buckets, hot_rows=1).buckets  # the same pages
    order = torch.randint(0, buckets, (size,), dtype=torch.int32)
    library.read_lines.restype = ctypes.c_uint64
    arguments = ctypes.c_void_p(lines.data_ptr()), ctypes.c_void_p(order.data_ptr())

    def read(keep: tuple[Tensor, Tensor] = (lines, order)) -> None:
        library.read_lines(*arguments, len(keep[1]))

    def update(keep: tuple[Tensor, Tensor] = (lines, order)) -> None:
        library.update_lines(*arguments, len(keep[1]))

    return {"random reads": read, "random updates": update}


def _released_jobs(library: ctypes.CDLL, index: int, case: Case) -> dict[str, Callable[[], None]]:
    sketch = Released(library, index, case.buckets)
    ids = case.ids.int().split(BATCH)
    importance = case.importance.split(BATCH)

    def insert() -> None:
        with _quiet():
            for batch, scores in zip(ids, importance, strict=True):
                sketch.insert(batch, scores)

    def query() -> None:
        for batch in ids:
            sketch.query(batch)

    insert()
    return {"released insert": insert, "released query": query}


def _judge(prefix: str, speed: dict[str, float], *, large: bool) -> list[Row]:
    rows = []

    def add(
        name: str, value: float, unit: str, baseline: float | None, target: float | None
    ) -> None:
        rows.append(Row(f"{prefix}/{name}", value, unit, baseline, target))

    unit = "M/s"
    for ours, theirs in (("observe", "released insert"), ("remap", "released query")):
        base = speed.get(theirs)
        add(ours, speed[ours], unit, base, None if base is None else 2 * base)
        if base is not None:
            add(theirs, base, unit, None, None)
        step = speed[f"{ours} step"]
        add(f"{ours}, batch {STEP}", step, unit, speed[ours], None)
        for name, value in ((ours, speed[ours]), (f"{ours}, batch {STEP}", step)):
            share = value / speed["random reads"]
            add(f"{name}/share of random reads", share, "", None, 0.6 if large else None)
        add(f"{ours}, batch {STEP}, 2 threads", speed[f"{ours} step 2"] / step, "x", 1.0, 1.7)
    for name in ("random reads", "random updates"):
        add(name, speed[name], unit, None, None)
    return rows


def measure_speed(options: argparse.Namespace) -> list[Row]:
    """Operations per second of every sketch size and distribution."""
    size = (1 << 20) if options.quick else (1 << 22)
    floor = compile_native(NATIVE / "random_reads.cpp")
    released = compile_native(Path(options.released), "-w") if options.released else None
    rows: list[Row] = []
    cases = [(*sizes, name) for sizes in SIZES for name in DISTRIBUTIONS]
    for index, (buckets, num_ids, name) in enumerate(tqdm(cases, desc="speed", leave=False)):
        torch.set_num_threads(1)
        case = Case.make(buckets, num_ids, DISTRIBUTIONS[name], size)
        jobs = {
            "observe": case.observe_job(BATCH, 1),
            "remap": case.remap_job(BATCH, 1),
            "observe step": case.observe_job(STEP, 1),
            "remap step": case.remap_job(STEP, 1),
            "observe step 2": case.observe_job(STEP, 2),
            "remap step 2": case.remap_job(STEP, 2),
        } | _floor_jobs(floor, buckets, size)
        if released is not None:
            jobs |= _released_jobs(released, index, case)
        seconds = interleaved(jobs, 3 if options.quick else 15)
        speed = {job: size / took / 1e6 for job, took in seconds.items()}
        rows += _judge(f"{name}/{buckets} buckets", speed, large=buckets == SIZES[-1][0])
        took = interleaved({"rebalance": case.rebalance_job()}, 5)["rebalance"]
        rows.append(Row(f"{name}/{buckets} buckets/rebalance of a step", 1e3 * took, "ms"))
    return rows


def check() -> None:
    """The operators do what their definition says, on a stream with everything in it."""
    generator = torch.Generator().manual_seed(0)
    native = SketchState.empty(shards=4, buckets=16, hot_rows=12)
    plain = SketchState.empty(shards=4, buckets=16, hot_rows=12)
    for _ in range(5):
        keys = (torch.rand(2000, generator=generator) ** 3 * 600).long()
        batch = keys, (keys % 5 - 1).int(), torch.rand(2000, generator=generator)
        for state, module in ((native, ops), (plain, reference)):
            module.observe(state, *batch, growth=1.5)
            module.rebalance(state, torch.arange(4), hysteresis=0.1)
        for name, tensor in native.tensors().items():
            assert torch.equal(tensor, plain.tensors()[name]), name


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short streams: within a minute")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--released", default="", help="the paper's released sketch.cpp")
    parser.add_argument("--parts", default="speed,recall", help="speed, recall or both")
    parser.add_argument("--json", default="", help="where to write the figures")
    parser.add_argument("--plot", default="", help="where to draw recall against memory")
    options = parser.parse_args()
    check()
    rows = measure_speed(options) if "speed" in options.parts else []
    if "recall" in options.parts:
        rows += measure_recall(quick=options.quick, plot=options.plot)
    print_rows(rows)
    write_json(options.json, "hot_sketch", rows)


if __name__ == "__main__":
    main()
