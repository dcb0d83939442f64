"""Does the hot set follow real accesses? Recall on cache2k's traces, an eighth at a time.

A trace is a file of big-endian uint32: the object of each access, its type in bits 27-31. Every
access has importance 1. At the end of each eighth, recall is the share of the k ids most accessed
in that eighth that own one of the k rows.
"""

from __future__ import annotations

import lzma
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import Row
from torchrec_cafe.ops import COLD, SLOTS, SketchState, observe, rebalance

EIGHTHS = 8
#: half-lives of an access, in eighths of a trace
HALF_LIVES = (0.125, 0.25, 0.5, 1.0, math.inf)
FROZEN = "frozen after the first eighth"
EXACT = "exact counts, no decay"
_BATCHES = 64  # of an eighth
_INTERVAL = 16  # batches between two decisions, as many as Cafe's steps
_SHARDS = 16
_SLOTS_PER_HOT_ROW = 3
_HOT_SHARE = 0.01  # of the ids
_TYPE_BITS = 27

_SUFFIX = ".trace.xz"


def read_trace(path: Path) -> Tensor:
    """The keys of a trace's accesses, int64: type and object as table and id.

    Args:
        path: a ``.trace.xz``.

    Raises:
        ValueError: if the file is not a whole number of accesses.
    """
    content = lzma.decompress(path.read_bytes())
    if not content or len(content) % 4:
        raise ValueError(f"--traces: {path} must hold 4-byte accesses, got {len(content)} bytes")
    accesses = torch.from_numpy(np.frombuffer(content, dtype=">u4").astype(np.int64))
    table, id_ = accesses >> _TYPE_BITS, accesses & ((1 << _TYPE_BITS) - 1)
    return table << 48 | id_


def _shards_of(keys: Tensor) -> Tensor:
    """Spread by a hash that has nothing to do with the buckets'."""
    return (((keys * 0x9E3779B97F4A7C1) >> 20) & 0x7FFFFFFF).remainder(_SHARDS).int()


def _top(keys: Tensor, size: int) -> Tensor:
    """The most frequent keys; ties go to the smallest."""
    ids, counts = keys.unique(return_counts=True)
    return ids[counts.argsort(descending=True, stable=True)[:size]]


def _recall(held: Tensor, top: Tensor) -> float:
    return torch.isin(top, held).double().mean().item()


def _hot_sets(parts: Sequence[Tensor], hot_rows: int, half_life: float) -> list[Tensor]:
    """The keys that own a row at the end of each part.

    Args:
        parts: keys of each eighth.
        hot_rows: of each virtual shard.
        half_life: in eighths.
    """
    buckets = math.ceil(hot_rows * _SLOTS_PER_HOT_ROW / SLOTS)
    state = SketchState.empty(shards=_SHARDS, buckets=buckets, hot_rows=hot_rows)
    growth = 2.0 ** (1 / (half_life * _BATCHES))
    selected = torch.arange(_SHARDS)
    hot_sets = []
    for part in parts:
        for number, keys in enumerate(part.tensor_split(_BATCHES)):
            observe(state, keys, _shards_of(keys), torch.ones(len(keys)), growth=growth)
            if number % _INTERVAL == _INTERVAL - 1:
                rebalance(state, selected, hysteresis=0.1)
        hot_sets.append(state.keys[state.hot_rows > COLD])
    return hot_sets


def _label(half_life: float) -> str:
    return "no decay" if math.isinf(half_life) else f"half-life {half_life:g} × eighth"


def recalls(keys: Tensor) -> dict[str, Any]:
    """Recall at the end of each eighth of a trace, by what decides which ids are hot.

    Args:
        keys: int64, of the accesses.
    """
    num_ids = len(keys.unique())
    hot_rows = max(1, round(num_ids * _HOT_SHARE / _SHARDS))
    size = hot_rows * _SHARDS
    parts = keys.tensor_split(EIGHTHS)
    tops = [_top(part, size) for part in parts]

    def measure(hot_sets: Sequence[Tensor]) -> list[float]:
        return [_recall(hot, top) for hot, top in zip(hot_sets, tops, strict=True)]

    recall: dict[str, list[float]] = {}
    for half_life in HALF_LIVES:
        hot_sets = _hot_sets(parts, hot_rows, half_life)
        recall[_label(half_life)] = measure(hot_sets)
    recall[FROZEN] = measure([hot_sets[0]] * EIGHTHS)  # of the last: without decay
    exact = [_top(torch.cat(parts[: number + 1]), size) for number in range(EIGHTHS)]
    recall[EXACT] = measure(exact)
    return {"accesses": len(keys), "ids": num_ids, "hot_rows": size, "recall": recall}


def measure_traces(
    folder: Path, records: Path, write: Callable[[Path, dict[str, Any]], None]
) -> None:
    """Measure every trace of a folder that has no record yet.

    Args:
        folder: of the ``*.trace.xz``; if there are none, a note is printed.
        records: folder of the records.
        write: writes one.
    """
    paths = sorted(folder.glob(f"*{_SUFFIX}"))
    if not paths:
        print(f"traces: no *{_SUFFIX} in {folder}, skipped; see --traces")
    for path in tqdm(paths, desc="traces", disable=not paths):
        name = path.name.removesuffix(_SUFFIX)
        record = records / f"{name}.json"
        if not record.is_file():
            write(record, {"trace": name} | recalls(read_trace(path)))


def trace_table(record: Mapping[str, Any]) -> list[list[str]]:
    """Recall of one trace as rows of text, the header first.

    Args:
        record: what :func:`recalls` gave.
    """
    eighths = [f"{number}/{EIGHTHS}" for number in range(1, EIGHTHS + 1)]
    rows = [["hot ids", *eighths, f"mean 2-{EIGHTHS}"]]
    for rule, values in record["recall"].items():
        rows.append([rule, *(f"{v:.3f}" for v in values), f"{statistics.fmean(values[1:]):.3f}"])
    return rows


def trace_figures(record: Mapping[str, Any]) -> list[Row]:
    """Mean recall of one trace after its first eighth; the baseline is the frozen hot set's.

    Args:
        record: what :func:`recalls` gave.
    """
    means = {rule: statistics.fmean(values[1:]) for rule, values in record["recall"].items()}
    return [
        Row(f"traces/{record['trace']}/{rule}/recall", mean, "", means[FROZEN])
        for rule, mean in means.items()
    ]


def plot_traces(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Recall by eighth, one panel per trace.

    Args:
        path: PNG to write.
        records: what :func:`recalls` gave for each.
    """
    figure, panels = plt.subplots(
        1, len(records), figsize=(4.5 * len(records), 4), squeeze=False, constrained_layout=True
    )
    for axes, record in zip(panels[0], records, strict=True):
        for rule, values in record["recall"].items():
            style = "--" if rule in (FROZEN, EXACT) else "-"
            axes.plot(range(1, EIGHTHS + 1), values, style, marker="o", markersize=3, label=rule)
        axes.set_title(f"{record['trace']}: {record['hot_rows']} of {record['ids']:,} ids hot")
        axes.set(xlabel="eighth of the trace", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("recall of the eighth's true top k")
    panels[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
