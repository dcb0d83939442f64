"""Training speed with look-ahead tables on a GPU, against FBGEMM's ways to keep large tables.

``python -m benchmarks.lookahead_cuda --json FILE`` trains TorchRec's DLRM with the tables that
ScratchPipe's paper has (8 of 10 million rows, dim 128, 20 lookups a bag, batches of 2048):

* ``hbm``: all tables in the GPU's memory, under ``TrainPipelineSparseDist``; all else is divided by
  it, turn by turn, in the same process;
* ``lookahead``: ``Lookahead(cache_fraction=...)``, depths 0 and 4;
* ``lru``, ``lfu``: TorchRec's ``fused_uvm_caching`` of the same fraction, with and without
  ``PrefetchTrainPipelineSparseDist``;
* ``uvm``: TorchRec's ``fused_uvm``.

Two sets of tables are alive at a time: ``hbm``, and another in host memory (41 GB each). A figure
is the median of turns over the median of the turns of ``hbm`` between them. What is finished is
written to ``--parts`` and not measured again, so that a run that had to end can go on; no new way
is begun after ``--minutes``. Ids are Zipf-distributed, of low, middle and high locality.

``--quick`` has small tables. ``--device cpu`` runs what there is without a GPU (``hbm`` is in host
memory then): it says that the benchmark works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.common import Row, print_rows, write_json
from benchmarks.lookahead_cuda_ways import (
    ALL_IN_HBM,
    BATCHES,
    Sizes,
    Trained,
    Way,
    batches,
    start_group,
    ways,
)

QUICK = Sizes(tables=4, rows=200_000, dim=64, batch=512, pooling=8, over_arch=(256, 128))
MAIN_DEPTH = 4
#: least speed of look-ahead tables over that of others
TARGETS = {"hbm": 0.95, "cached": 2.8, "prefetched": 1.2}

Part = dict[str, Any]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        given: its words; ``None``: those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small tables: within a minute")
    for field in ("tables", "rows", "dim", "batch", "pooling"):
        parser.add_argument(f"--{field}", type=int, default=0, help="0: the paper's")
    parser.add_argument("--fractions", default="0.05,0.02,0.1", help="of rows in the GPU's memory")
    parser.add_argument("--exponents", default="0.6,0.8,1.05", help="of the ids' distributions")
    parser.add_argument("--depths", default=f"{MAIN_DEPTH},0", help="batches to look ahead")
    parser.add_argument("--ways", default="", help="names of ways to keep tables; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a turn")
    parser.add_argument("--batches", type=int, default=BATCHES, help="that are trained in a circle")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no way is begun")
    parser.add_argument("--parts", default="", help="where finished ways are noted; goes on there")
    parser.add_argument("--json", default="", help="where to write the figures")
    return parser.parse_args(given)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes that the options ask for."""
    start = QUICK if options.quick else Sizes()
    fields = ("tables", "rows", "dim", "batch", "pooling")
    asked = {field: getattr(options, field) for field in fields if getattr(options, field)}
    return dataclasses.replace(start, **asked)


def wanted(options: argparse.Namespace) -> list[Way]:
    """The ways that the options ask for."""
    fractions = [float(word) for word in options.fractions.split(",")]
    found = ways(fractions, [int(word) for word in options.depths.split(",")])
    names = options.ways.split(",") if options.ways else []
    unknown = sorted(set(names) - {way.name.split(",")[0] for way in found})
    if unknown:
        raise SystemExit(f"error: --ways must be of lookahead, lru, lfu and uvm, got {unknown}")
    if names:
        found = [way for way in found if way.name.split(",")[0] in names]
    if options.device == "cpu":
        found = [way for way in found if not way.kernel]
    return found


class Bench:
    """The tables in the GPU's memory, the ids of all distributions, and what is finished.

    Args:
        options: of :func:`arguments`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Build what all ways are compared with; see the class."""
        self._options = options
        self._sizes = sizes_of(options)
        self._device = (
            torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
        )
        self._path = Path(options.parts) if options.parts else None
        self.parts: dict[str, Part] = {}
        self._key = json.dumps([dataclasses.asdict(self._sizes), options.device, options.exponents])
        if self._path is not None and self._path.exists():
            noted = json.loads(self._path.read_text())
            if noted["of"] != self._key:
                raise SystemExit(f"error: --parts {self._path} has other sizes: name another file")
            self.parts = noted["parts"]
        self._data = {
            word: itertools.cycle(batches(self._sizes, float(word), options.batches, self._device))
            for word in options.exponents.split(",")
        }
        self._hbm = Trained(self._sizes, ALL_IN_HBM, self._device)

    def measure(self, group: list[Way]) -> None:
        """Train ways that keep their tables alike, in turns with all in the GPU's memory.

        Args:
            group: of which each is noted when it is finished.
        """
        left = [way for way in group if way.key not in self.parts]
        if not left:
            return
        other = Trained(self._sizes, left[0], self._device)
        for way in left:
            self.parts[way.key] = {
                word: self._turns(other, way, data) for word, data in self._data.items()
            }
            self._note()
        del other
        gc.collect()

    def _turns(self, other: Trained, way: Way, data: Any) -> Part:
        steps = self._options.steps
        other.turn(way, data, self._options.batches)  # caches fill
        seconds: dict[str, list[float]] = {"hbm": [], "other": []}
        before = other.statistics()
        for _ in range(self._options.rounds):
            seconds["hbm"].append(self._hbm.turn(ALL_IN_HBM, data, steps))
            seconds["other"].append(other.turn(way, data, steps))
        after = other.statistics()
        moved = {name: after[name] - before[name] for name in after}
        return {**{name: statistics.median(of) for name, of in seconds.items()}, "moved": moved}

    def _note(self) -> None:
        if self._path is not None:
            self._path.write_text(json.dumps({"of": self._key, "parts": self.parts}, indent=1))


def groups_of(found: list[Way]) -> list[list[Way]]:
    """Ways whose tables are kept alike, together: they differ in the pipeline only."""
    together: dict[Way, list[Way]] = {}
    for way in found:
        alike = dataclasses.replace(way, name="", depth=0)
        together.setdefault(alike, []).append(way)
    return list(together.values())


def judge(parts: Mapping[str, Part], batch: int, fractions: list[str]) -> list[Row]:
    """The figures.

    Args:
        parts: by way, by exponent, seconds of a step of it and of all in the GPU's memory.
        batch: samples of a step.
        fractions: that there may be figures for.
    """
    rows, ratios = [], {}
    for key, of in parts.items():
        for word, part in of.items():
            ratios[key, word] = part["hbm"] / part["other"]
            rows.append(Row(f"zipf {word}/{key}", batch / part["other"], "samples/s"))
            rows.append(Row(f"zipf {word}/{key} over hbm", ratios[key, word], "x", 1.0))
            for name, value in part["moved"].items():
                rows.append(Row(f"zipf {word}/{key}: {name}", value, ""))
    for fraction in fractions:
        for word in sorted({word for _, word in ratios}):
            ours = ratios.get((f"lookahead, depth {MAIN_DEPTH} {fraction}", word))
            if ours is None:
                continue
            name = f"zipf {word}/lookahead {fraction} over"
            rows.append(Row(f"{name} hbm", ours, "x", 1.0, TARGETS["hbm"]))
            for of, suffix in (("cached", ""), ("prefetched", ", prefetched")):
                keys = [(f"{kind}{suffix} {fraction}", word) for kind in ("lru", "lfu")]
                best = max((ratios[key] for key in keys if key in ratios), default=None)
                if best is not None:
                    rows.append(Row(f"{name} {of}", ours / best, "x", 1.0, TARGETS[of]))
    return rows


def main(given: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        given: its words; ``None``: those of the process.
    """
    options = arguments(given)
    end = time.monotonic() + 60 * options.minutes
    found = wanted(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU; --device cpu tries the code without one")
    device = torch.device(options.device)
    start_group(device)
    try:
        bench = Bench(options)
        skipped = []
        for group in tqdm(groups_of(found), desc="ways", leave=False):
            if time.monotonic() < end:
                bench.measure(group)
            else:
                skipped += [way.key for way in group if way.key not in bench.parts]
        fractions = [str(float(word)) for word in options.fractions.split(",")]
        rows = judge(bench.parts, sizes_of(options).batch, fractions)
        print_rows(rows)
        write_json(options.json, "lookahead_cuda", rows)
        if skipped:
            print(f"not measured within --minutes, run again with the same --parts: {skipped}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
