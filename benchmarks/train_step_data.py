"""What :mod:`benchmarks.train_step` trains on: its cases, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from benchmarks.common import zipf_ids
from examples.dlrm.data.generator import NUM_EMBEDDINGS

FEATURES = tuple(f"cat_{number}" for number in range(len(NUM_EMBEDDINGS)))
NUM_DENSE = 13
#: the fewest distinct batches of a case, and the most
BATCHES = 20, 80


@dataclass(frozen=True)
class Layers:
    """Sizes of the dense layers.

    Attributes:
        bottom: of the bottom layers, besides the last, which is the tables' dim.
        over: of those over the interactions.
    """

    bottom: tuple[int, ...]
    over: tuple[int, ...]


LAYERS = {
    "small": Layers((64,), (256, 128, 1)),
    # bench/dlrm_s_criteo_kaggle.sh of facebookresearch/dlrm, which the CAFE paper trains.
    "reference": Layers((512, 256, 64), (512, 256, 1)),
}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        dim: columns of every table.
        batch: samples of a step.
        pooling: ids of a bag.
    """

    dim: int
    batch: int
    pooling: int = 1

    def __str__(self) -> str:
        bags = f", {self.pooling} ids a bag" if self.pooling > 1 else ""
        return f"dim {self.dim}, batch {self.batch}{bags}"


CASES = (
    *(Case(dim, batch) for dim in (16, 64, 128) for batch in (2048, 16384)),
    Case(64, 2048, pooling=20),
)
QUICK_CASES = CASES[:2]
#: cases whose steps are taken apart
PARTS_CASES = (*CASES[:2], CASES[-1])


def parse_cases(text: str) -> tuple[Case, ...]:
    """Cases from ``DIM:BATCH`` or ``DIM:BATCH:POOLING``, separated by commas.

    Args:
        text: such as ``16:2048,64:2048:20``.

    Raises:
        ValueError: if it cannot be read so.
    """
    try:
        found = tuple(Case(*map(int, part.split(":"))) for part in text.split(","))
    except (TypeError, ValueError):
        raise ValueError(f"--cases must be DIM:BATCH[:POOLING],..., got {text!r}") from None
    for case in found:
        if min(case.dim, case.batch, case.pooling) < 1 or case.dim % 4:
            raise ValueError(f"--cases must be >= 1, dims multiples of 4, got {text!r}")
    return found


def draw_ids(cases: Sequence[Case]) -> Tensor:
    """Enough ids for every case, int64 ``[F, n]``; the popular ids of a table are anywhere."""
    size = BATCHES[0] * max(case.batch * case.pooling for case in cases)
    tables = tqdm(NUM_EMBEDDINGS, desc="ids", unit="table", leave=False)
    return torch.stack([zipf_ids(n, size, 1.05, seed) for seed, n in enumerate(tables)])


def make_batches(case: Case, ids: Tensor) -> list[Batch]:
    """The batches of a case; both the ids and the dense features tell of the labels."""
    random = np.random.default_rng(0)
    effects = random.standard_normal(1009, np.float32)
    lengths = torch.full((len(FEATURES) * case.batch,), case.pooling, dtype=torch.int32)
    batches = []
    for part in ids.split(case.batch * case.pooling, dim=1)[: BATCHES[1]]:
        bags = effects[part.numpy() % len(effects)].reshape(len(FEATURES), case.batch, -1)
        dense = random.standard_normal((case.batch, NUM_DENSE), np.float32)
        logit = dense[:, 0] + bags.mean(2).sum(0) / 2
        clicked = random.random(case.batch) < 1 / (1 + np.exp(-logit))
        batches.append(
            Batch(
                dense_features=torch.from_numpy(dense),
                sparse_features=KeyedJaggedTensor(
                    keys=list(FEATURES),
                    values=part.reshape(-1),
                    lengths=lengths,
                    stride=case.batch,
                ),
                labels=torch.from_numpy(clicked.astype(np.float32)),
            )
        )
    return batches
