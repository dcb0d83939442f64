"""Click logs in memory-mapped arrays, and the batches one rank reads from them.

Shape legend: ``n`` rows, ``F`` categorical features, ``D`` dense features, ``B`` rows of one batch
on one rank, ``W`` ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class FeatureSpec(NamedTuple):
    """A categorical feature.

    Attributes:
        name: its name, the key in every batch.
        num_embeddings: number of distinct ids; ids are ``0 .. num_embeddings - 1``.
    """

    name: str
    num_embeddings: int


@dataclass(frozen=True)
class Split:
    """Rows of a click log in the order they are read; the arrays may be memory maps.

    Attributes:
        labels: uint8 ``[n]``, 0 or 1.
        dense: float32 ``[n, D]``.
        ids: int32 or int64 ``[n, F]``.
    """

    labels: np.ndarray
    dense: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, begin: int, end: int) -> "Split":
        """The rows from ``begin`` to before ``end``; nothing is copied."""
        return Split(*(array[begin:end] for array in (self.labels, self.dense, self.ids)))

    def take(self, num_rows: int) -> "Split":
        """Copies ``num_rows`` rows, evenly spaced and in order, into memory.

        Args:
            num_rows: how many rows to keep, 0 to ``len(self)``.

        Returns:
            The rows kept, or this very split when that is all of them.

        Raises:
            ValueError: if there are fewer rows than asked for.
        """
        if not 0 <= num_rows <= len(self):
            raise ValueError(
                f"Split.take: `num_rows` must be between 0 and {len(self)}, got {num_rows}; "
                "ask for fewer rows"
            )
        if num_rows == len(self):
            return self
        index = np.arange(num_rows, dtype=np.int64) * len(self) // max(num_rows, 1)
        ids = np.asfortranarray(self.ids[index])  # ordered by feature, as batches are
        return Split(np.array(self.labels[index]), np.array(self.dense[index]), ids)


@dataclass(frozen=True, kw_only=True)
class ClickLog:
    """A click log, split in time into rows to train on and rows to test on.

    Attributes:
        name: short name.
        description: one line for reports: what the data is and where it comes from.
        features: the categorical features, in the order of the columns of ``Split.ids``.
        num_dense: number of dense features, ``D``.
        train: the earlier rows.
        test: the later rows.
        validation: rows between those two, if any are held out.
    """

    name: str
    description: str
    features: tuple[FeatureSpec, ...]
    num_dense: int
    train: Split
    test: Split
    validation: Split | None = None


@final
class BatchLoader:
    """Reads a split as the batches of one rank.

    Global batch ``g`` is rows ``g * batch_size * world_size`` onwards, and rank ``r`` gets its
    ``r``-th contiguous slice: ``W`` ranks together see what one rank with ``W`` times the batch
    size sees, in the same order. Each batch has exactly one id per feature and sample.

    Every pass yields the same batches. Every rank yields the same number of them.

    Args:
        split: the rows.
        features: the categorical features, one for each column of ``split.ids``.
        batch_size: rows in a full batch on one rank, at least 1.
        rank: this rank, 0 to ``world_size - 1``.
        world_size: number of ranks, at least 1.
        drop_last: drop the last global batch when it is not full. When False, its rows are divided
            evenly, so that ranks may get fewer than ``batch_size`` rows, or none.

    Raises:
        ValueError: if an argument is out of its range, or ``features`` does not fit ``split``.

    Example:
        >>> import numpy as np
        >>> rows = Split(np.ones(3, "u1"), np.zeros((3, 2), "f4"), np.arange(6).reshape(3, 2))
        >>> features = [FeatureSpec("user", 10), FeatureSpec("item", 10)]
        >>> loader = BatchLoader(rows, features, batch_size=2, drop_last=False)
        >>> [batch.sparse_features.values().tolist() for batch in loader]
        [[0, 2, 1, 3], [4, 5]]
    """

    def __init__(
        self,
        split: Split,
        features: Sequence[FeatureSpec],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool,
    ) -> None:
        if batch_size < 1:
            raise ValueError(
                f"BatchLoader: `batch_size` must be at least 1, got {batch_size}; "
                "pass the number of rows each rank reads at a time"
            )
        if world_size < 1:
            raise ValueError(
                f"BatchLoader: `world_size` must be at least 1, got {world_size}; "
                "pass the number of ranks"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"BatchLoader: `rank` must be between 0 and {world_size - 1}, got {rank}; "
                "pass the rank within `world_size`"
            )
        if split.ids.ndim != 2 or split.ids.shape[1] != len(features):
            raise ValueError(
                f"BatchLoader: `features` must name every column of `split.ids`, which has shape "
                f"{list(split.ids.shape)}, got {len(features)} features; pass the log's own"
            )
        self._split = split
        self._keys = [feature.name for feature in features]
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._drop_last = drop_last

    @property
    def num_samples(self) -> int:
        """Rows of one pass over all ranks, those of a dropped batch too."""
        return len(self._split)

    def __len__(self) -> int:
        """Number of batches in one pass, the same on every rank."""
        full, rest = divmod(len(self._split), self._batch_size * self._world_size)
        return full if self._drop_last or rest == 0 else full + 1

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of one pass, on the CPU.

        Yields:
            ``dense_features`` float32 ``[B, D]``; ``sparse_features`` with int64 values ``[F * B]``
            ordered by feature, then sample, and int32 lengths, all one; ``labels`` float32 ``[B]``.
        """
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Batch:
        """A batch of a pass, as iterating yields it.

        Args:
            number: in ``[0, len)``.

        Raises:
            IndexError: if there is no such batch.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"BatchLoader has batches 0 to {len(self) - 1}, got {number}")
        global_size = self._batch_size * self._world_size
        first = number * global_size
        size = min(global_size, len(self._split) - first)
        begin = first + size * self._rank // self._world_size
        end = first + size * (self._rank + 1) // self._world_size
        # Always copied: torch must not share the memory of a read-only map.
        split, size = self._split, end - begin
        values = np.array(split.ids[begin:end].T, dtype=np.int64, order="C").reshape(-1)
        dense = np.array(split.dense[begin:end], dtype=np.float32, order="C")
        return Batch(
            dense_features=torch.from_numpy(dense),
            sparse_features=KeyedJaggedTensor(
                keys=self._keys,
                values=torch.from_numpy(values),
                lengths=torch.ones(len(self._keys) * size, dtype=torch.int32),
                stride=size,
            ),
            labels=torch.from_numpy(np.array(split.labels[begin:end], dtype=np.float32)),
        )
