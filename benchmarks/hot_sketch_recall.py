"""How many of the truly highest scores own a row, by memory and by what a full bucket does.

A Zipf(1.05) stream over 10 million ids. A tenth of the 100,000 most popular ids change places with
random ones every 2 million occurrences, and old occurrences count half after 8 million: the truth
drifts. Recall is the share of the k ids with the highest true scores that own one of the k rows,
averaged over the stream, just before each change.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import NATIVE, Row, compile_native, zipf_ranks
from torchrec_cafe import ops
from torchrec_cafe.ops import COLD, FREE, SketchState

HOT_ROWS = 13_505
#: bytes of sketch per hot row, and the recall that the paper's sketch of so many bytes has
PAPER = {48.0: 0.825, 76.8: 0.92, 115.2: 0.946}
SEGMENT = 2_000_000
HALF_LIFE = 8_000_000
BATCH = 8192
#: the rules of native/full_bucket.cpp: number and wear
RULES = {
    "SpaceSaving, cold slots": (0, 0.0),
    "SpaceSaving, all slots": (1, 0.0),
    "the released code's rule": (2, 0.0),
    "replace, inherit nothing": (3, 0.0),
    "wear off all": (4, 1.0),
    "wear off 1/2": (4, 0.5),
    "wear off 1/4": (4, 0.25),
    "wear off 1/8": (4, 0.125),
}


@dataclass(frozen=True)
class Layout:
    """Sizes of a sketch.

    Attributes:
        shards: virtual shards.
        hot_rows: of each shard.
        buckets: of each shard.
    """

    shards: int
    hot_rows: int
    buckets: int

    @classmethod
    def of(cls, shards: int, bytes_per_hot_row: float) -> Layout:
        """The sketch that costs so much: 64 bytes a bucket, 4 bytes the owner of a row."""
        hot_rows = HOT_ROWS // shards
        return cls(shards, hot_rows, round((bytes_per_hot_row - 4) / 64 * hot_rows))


@dataclass(frozen=True)
class Stream:
    """The occurrences, in batches that never cross a change.

    Attributes:
        segments: int64 ids of each segment.
        top: per segment, the k ids with the highest true scores at its end.
    """

    segments: list[Tensor]
    top: list[Tensor]

    @classmethod
    def draw(cls, num_ids: int, segments: int, seed: int) -> Stream:
        """Draw ids, and keep the exact scores."""
        random = np.random.default_rng(seed)
        id_of_rank = random.permutation(num_ids)
        true = np.zeros(num_ids)
        ids, top = [], []
        for segment in range(segments):
            if segment > 0:
                movers = np.flatnonzero(random.random(100_000) < 0.1)
                others = random.integers(0, num_ids, movers.size)
                for mover, other in zip(movers, others, strict=True):
                    id_of_rank[[mover, other]] = id_of_rank[[other, mover]]
            drawn = id_of_rank[zipf_ranks(num_ids, SEGMENT, 1.05, random)]
            true *= 2.0 ** (-SEGMENT / HALF_LIFE)
            ages = np.arange(SEGMENT)[::-1] // BATCH * BATCH
            np.add.at(true, drawn, 2.0 ** (-ages / HALF_LIFE))
            ids.append(torch.from_numpy(drawn))
            top.append(torch.from_numpy(np.argpartition(-true, HOT_ROWS)[:HOT_ROWS]))
        return cls(ids, top)


def _shards_of(keys: Tensor, shards: int) -> Tensor:
    """Spread by a hash that has nothing to do with the buckets'."""
    return (((keys * 0x9E3779B97F4A7C1) >> 20) & 0x7FFFFFFF).remainder(shards).int()


def _recall(held: Tensor, top: Tensor) -> float:
    return torch.isin(top, held).double().mean().item()


def _run_operators(stream: Stream, layout: Layout, hysteresis: float) -> tuple[float, float, int]:
    """Recall of hot keys and of held keys, and promotions, of torchrec_cafe's operators."""
    state = SketchState.empty(
        shards=layout.shards, buckets=layout.buckets, hot_rows=layout.hot_rows
    )
    growth = 2.0 ** (BATCH / HALF_LIFE)
    selected = torch.arange(layout.shards)
    hot, held = [], []
    for ids, top in zip(stream.segments, stream.top, strict=True):
        for step, keys in enumerate(ids.split(BATCH)):
            ones = torch.ones(keys.numel())
            ops.observe(state, keys, _shards_of(keys, layout.shards), ones, growth=growth)
            if step % 16 == 15:
                ops.rebalance(state, selected, hysteresis=hysteresis)
        hot.append(_recall(state.keys[state.hot_rows > COLD], top))
        held.append(_recall(state.keys[state.hot_rows != FREE], top))
    promoted = int(state.counters[:, ops.COUNTERS.index("promoted")].sum())
    return float(np.mean(hot)), float(np.mean(held)), promoted


def _run_rule(
    library: ctypes.CDLL, stream: Stream, layout: Layout, rule: str, hysteresis: float
) -> tuple[float, float, int]:
    """The same of a rule of native/full_bucket.cpp."""
    number, wear = RULES[rule]
    state = SketchState.empty(
        shards=layout.shards, buckets=layout.buckets, hot_rows=layout.hot_rows
    )
    pointer = ctypes.c_void_p(state.buckets.data_ptr())
    library.rebalance_all.restype = ctypes.c_int64
    score, promoted = 1.0, 0
    hot, held = [], []
    for ids, top in zip(stream.segments, stream.top, strict=True):
        for step, keys in enumerate(ids.split(BATCH)):
            score *= 2.0 ** (BATCH / HALF_LIFE)
            shards = _shards_of(keys, layout.shards)
            library.add(
                *(pointer, ctypes.c_int64(layout.buckets), ctypes.c_void_p(keys.data_ptr())),
                *(ctypes.c_void_p(shards.data_ptr()), ctypes.c_int64(keys.numel())),
                *(ctypes.c_float(score), number, ctypes.c_float(wear)),
            )
            if step % 16 == 15:
                promoted += library.rebalance_all(
                    *(pointer, ctypes.c_int64(layout.shards), ctypes.c_int64(layout.buckets)),
                    *(ctypes.c_int64(layout.hot_rows), ctypes.c_float(hysteresis)),
                )
        hot.append(_recall(state.keys[state.hot_rows > COLD], top))
        held.append(_recall(state.keys[state.hot_rows != FREE], top))
    return float(np.mean(hot)), float(np.mean(held)), promoted


def _plot(path: str, figures: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 5))
    memory = list(PAPER)
    others = 0
    for name, values in figures.items():
        ours = name.startswith("torchrec_cafe")
        marker = "v" if "64 shards" in name else "^" if name.endswith(" 0") else "o"
        (line,) = axes.plot(memory, values, marker=marker, label=name, markersize=5)
        line.set_color("black" if ours else f"C{others}")
        line.set_linestyle("-" if ours else "--")
        others += not ours
    axes.plot(memory, list(PAPER.values()), "r*", markersize=12, label="CAFE paper (Criteo), c = 4")
    axes.set(xlabel="bytes of sketch per hot row", ylabel="recall of the true top k")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measure_recall(*, quick: bool, plot: str = "") -> list[Row]:
    """Recall by memory; the paper's is the target.

    Args:
        quick: a tenth of the ids, two segments, no comparison of rules.
        plot: where to draw the figures; empty: nowhere.
    """
    stream = Stream.draw(1_000_000 if quick else 10_000_000, 2 if quick else 10, seed=0)
    library = compile_native(NATIVE / "full_bucket.cpp")
    rows: list[Row] = []
    figures: dict[str, list[float]] = {}

    def jobs() -> Iterator[tuple[str, int, float]]:
        yield "torchrec_cafe", 16, 0.1
        if not quick:
            yield from (("torchrec_cafe", 64, 0.1), ("torchrec_cafe", 16, 0.0))
            yield from ((rule, 16, 0.1) for rule in RULES)

    for name, shards, hysteresis in tqdm(list(jobs()), desc="recall", leave=False):
        label = name
        if name == "torchrec_cafe":
            label = f"{name}, {shards} shards, hysteresis {hysteresis:g}"
        for memory, paper in PAPER.items():
            layout = Layout.of(shards, memory)
            if name == "torchrec_cafe":
                hot, held, promoted = _run_operators(stream, layout, hysteresis)
            else:
                hot, held, promoted = _run_rule(library, stream, layout, name, hysteresis)
            figures.setdefault(label, []).append(hot)
            target = paper if label.startswith("torchrec_cafe, 16") and not quick else None
            prefix = f"recall/{label}/{memory:g} bytes"
            rows.append(Row(prefix, hot, "", paper, target))
            rows.append(Row(f"{prefix}/held", held, ""))
            rows.append(Row(f"{prefix}/promotions", promoted, ""))
    if plot:
        _plot(plot, figures)
    return rows
