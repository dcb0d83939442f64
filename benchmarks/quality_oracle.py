"""The frequency oracle: which ids own a row is decided beforehand, by their exact frequencies.

It is a click log whose ids are rows: an id that owns a row has that row's number, the others have
their shared row's. Stock TorchRec tables are then trained on it, without a sketch.

Shape legend: ``n`` rows of the log, ``F`` features, ``N`` ids of a feature.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from tqdm import tqdm

import torchrec_cafe as tc
from examples.dlrm.data import ClickLog, FeatureSpec, Split
from examples.dlrm.data.storage import prepare_once
from examples.dlrm.loop import OnStep
from torchrec_cafe.config import TableShape
from torchrec_cafe.ops import mix_ids


@dataclass(frozen=True)
class Budget:
    """Cafe's division of a budget, its sketch and maps turned into hot rows.

    Attributes:
        shared_rows: per feature, rows that its ids share; all its ids if it is kept whole.
        tracked: per feature, whether its ids may own a row.
        hot_rows: rows to own, over all features.
    """

    shared_rows: tuple[int, ...]
    tracked: tuple[bool, ...]
    hot_rows: int

    @classmethod
    def of(cls, shapes: Sequence[TableShape], compression: float) -> Budget:
        """The budget of tables.

        Args:
            shapes: the tables, one per feature.
            compression: of Cafe.

        Raises:
            ValueError: if the budget is too small for Cafe.
        """
        # As the study's Cafe is.
        allocation = tc.Cafe(compression=compression, num_weight_hashes=0).allocate(shapes)
        shared_rows = tuple(allocation.shared_rows[shape.name] for shape in shapes)
        return cls(
            shared_rows=shared_rows,
            # Where every id has a shared row of its own, it needs no other.
            tracked=tuple(
                shape.name in allocation.tracked and rows < shape.num_embeddings
                for shape, rows in zip(shapes, shared_rows, strict=True)
            ),
            hot_rows=allocation.memory.total_bytes // shapes[0].row_bytes - sum(shared_rows),
        )


def fingerprint(log: ClickLog) -> str:
    """What tells a log from another of the same name: its sizes and a thousand of its rows."""
    digest = hashlib.sha256()
    sizes = [log.name, len(log.train), len(log.test), log.features]
    digest.update(json.dumps(sizes).encode())
    for split in (log.train, log.test):
        rows = split.take(min(1000, len(split)))
        digest.update(np.ascontiguousarray(rows.ids).tobytes())
        digest.update(np.ascontiguousarray(rows.labels).tobytes())
    return digest.hexdigest()[:12]


def _frequencies(log: ClickLog) -> list[np.ndarray]:
    """Per feature, int64 ``[N]``: how often each id occurs in the training split."""
    return [
        np.bincount(log.train.ids[:, column], minlength=feature.num_embeddings)
        for column, feature in enumerate(log.features)
    ]


def choose_hot_ids(frequencies: Sequence[np.ndarray], budget: Budget) -> list[np.ndarray]:
    """The most frequent ids over all tracked features; ties go to the first.

    Args:
        frequencies: per feature, int64 ``[N]``.
        budget: how many ids own a row, and of which features.

    Returns:
        Per feature, its ids that own a row, ascending.
    """
    counts = [
        frequency if tracked else frequency[:0]
        for frequency, tracked in zip(frequencies, budget.tracked, strict=True)
    ]
    merged = np.concatenate(counts)
    size = min(budget.hot_rows, len(merged))
    hot = np.zeros(len(merged), dtype=bool)
    if size > 0:
        least = np.partition(merged, len(merged) - size)[len(merged) - size]
        hot = merged > least
        ties = np.flatnonzero(merged == least)
        hot[ties[: size - np.count_nonzero(hot)]] = True
    ends = np.cumsum([len(count) for count in counts])
    return [np.flatnonzero(part) for part in np.split(hot, ends[:-1])]


def row_of_id(num_ids: int, shared_rows: int, hot_ids: np.ndarray) -> np.ndarray:
    """The row of each id of a feature: first the owned rows, then the shared ones.

    Args:
        num_ids: ids of the feature.
        shared_rows: rows that they share; a feature with one for each id keeps its ids.
        hot_ids: ids that own a row.

    Returns:
        int32 ``[N]``; an id that owns no row has the shared row that Cafe gives it.
    """
    if shared_rows == num_ids:
        return np.arange(num_ids, dtype=np.int32)
    mixed = mix_ids(
        torch.arange(num_ids), torch.tensor([0, num_ids]), torch.tensor([num_ids]), _zero()
    )
    rows = (len(hot_ids) + mixed * shared_rows // num_ids).numpy().astype(np.int32)
    rows[hot_ids] = np.arange(len(hot_ids))
    return rows


def _zero() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def oracle_log(
    log: ClickLog, budget: Budget, cache_dir: Path, *, progress: bool = False
) -> ClickLog:
    """The log with rows in place of ids, made once.

    Args:
        log: the log.
        budget: see :class:`Budget`.
        cache_dir: the ids lie in its folder ``oracle-<log>-<digest>``.
        progress: whether to show a progress bar.
    """
    key = [fingerprint(log), vars(budget)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    folder = cache_dir / f"oracle-{log.name}-{digest}"
    prepare_once(folder, lambda partial: _write(log, budget, partial, progress=progress))
    sizes = json.loads((folder / "rows.json").read_text())
    ids = np.load(folder / "ids.npy", mmap_mode="r")
    return replace(
        log,
        features=tuple(
            FeatureSpec(feature.name, size)
            for feature, size in zip(log.features, sizes, strict=True)
        ),
        train=Split(log.train.labels, log.train.dense, ids[: len(log.train)]),
        test=Split(log.test.labels, log.test.dense, ids[len(log.train) :]),
    )


def _write(log: ClickLog, budget: Budget, folder: Path, *, progress: bool) -> None:
    hot_ids = choose_hot_ids(_frequencies(log), budget)
    ids = np.lib.format.open_memmap(
        folder / "ids.npy",
        "w+",
        dtype=np.int32,
        shape=(len(log.train) + len(log.test), len(log.features)),
        fortran_order=True,
    )
    sizes = []
    bar = tqdm(log.features, desc="frequency oracle", unit="feature", disable=not progress)
    for column, feature in enumerate(bar):
        shared = budget.shared_rows[column]
        rows = row_of_id(feature.num_embeddings, shared, hot_ids[column])
        ids[: len(log.train), column] = rows[log.train.ids[:, column]]
        ids[len(log.train) :, column] = rows[log.test.ids[:, column]]
        sizes.append(shared + len(hot_ids[column]))
    ids.flush()
    (folder / "rows.json").write_text(json.dumps(sizes))


def keep_spread(log: ClickLog, oracle: ClickLog) -> OnStep:
    """Start the oracle's rows with the spread that the uncompressed tables' would have.

    TorchRec draws from +-sqrt(1 / rows), so a small table would start with larger weights than the
    table it stands for; the rows of Cafe and Hash do not.

    Args:
        log: the log that the oracle was made from.
        oracle: the oracle's.
    """
    factors = {
        f"t_{before.name}.weight": math.sqrt(after.num_embeddings / before.num_embeddings)
        for before, after in zip(log.features, oracle.features, strict=True)
    }

    def on_step(step: int, model: DistributedModelParallel) -> None:
        if step > 0:
            return
        scaled = 0
        for name, parameter in model.named_parameters():
            _, found, table = name.rpartition("embedding_bags.")
            if found:
                parameter.data.mul_(factors[table])
                scaled += 1
        assert scaled == len(factors), f"{scaled} of {len(factors)} tables found"

    return on_step
