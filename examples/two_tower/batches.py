"""Batches of purchases as TorchRec takes them.

Shape legend: ``B`` purchases, ``N`` products of their histories.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from examples.two_tower.purchases import ATTRIBUTES, Purchases

#: features of the collection of sequences, which look into the products
SEQUENCES = ("history", "candidate")
#: features of the collection of bags
BAGS = ("user", *ATTRIBUTES)


@dataclass
class Batch(Pipelineable):
    """Purchases, each a query (household and history) and its candidate (the product bought).

    Attributes:
        sequences: the features :data:`SEQUENCES`.
        bags: the features :data:`BAGS`, one id each.
        products: int64 ``[B]``, the candidates once more, to tell the same from others.
        log_share: float32 ``[B]``, log of the share of the training purchases of each candidate.
    """

    sequences: KeyedJaggedTensor
    bags: KeyedJaggedTensor
    products: Tensor
    log_share: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:  # noqa: FBT001, FBT002
        """The batch on a device."""
        return Batch(
            self.sequences.to(device, non_blocking),
            self.bags.to(device, non_blocking),
            self.products.to(device, non_blocking=non_blocking),
            self.log_share.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: Any) -> None:
        """Keep the memory until the stream is done with it."""
        self.sequences.record_stream(stream)
        self.bags.record_stream(stream)
        for tensor in (self.products, self.log_share):
            if tensor.is_cuda:
                tensor.record_stream(stream)


class BatchMaker:
    """Makes batches of purchases.

    Args:
        purchases: the data set.
        history: most products of a history.
    """

    def __init__(self, purchases: Purchases, history: int) -> None:
        """Count the products; see the class."""
        self._data = purchases
        self._history = history
        trained = purchases.product[purchases.order[: purchases.num_train]]
        counts = np.bincount(trained, minlength=purchases.sizes["product"])
        self.counts: NDArray[np.int64] = counts
        shares = np.maximum(counts, 1) / max(1, len(trained))
        self._log_share = np.log(shares).astype(np.float32)

    def of_purchases(self, places: NDArray[np.int32]) -> Batch:
        """A batch of purchases.

        Args:
            places: int32 ``[B]``, of the purchases.
        """
        data = self._data
        ends = data.basket[places].astype(np.int64)
        begins = np.maximum(data.first[places], ends - self._history)
        lengths = ends - begins
        starts = np.cumsum(lengths) - lengths
        within = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        past = data.product[np.repeat(begins, lengths) + within]
        return self._batch(past, lengths, data.product[places], data.user[places])

    def of_products(self, products: NDArray[np.int64]) -> Batch:
        """A batch of candidates, with queries that mean nothing.

        Args:
            products: int64 ``[B]``.
        """
        nothing = np.zeros(len(products), dtype=np.int64)
        return self._batch(nothing[:0], nothing, products, nothing)

    def _batch(
        self,
        past: NDArray[np.integer],
        lengths: NDArray[np.int64],
        products: NDArray[np.integer],
        users: NDArray[np.integer],
    ) -> Batch:
        ones = np.ones(len(products), dtype=np.int64)
        attributes = self._data.attributes[:, products]
        return Batch(
            sequences=KeyedJaggedTensor(
                keys=list(SEQUENCES),
                values=_tensor(np.concatenate([past, products])),
                lengths=_tensor(np.concatenate([lengths, ones])),
            ),
            bags=KeyedJaggedTensor(
                keys=list(BAGS),
                values=_tensor(np.concatenate([users, attributes.reshape(-1)])),
                lengths=torch.ones(len(BAGS) * len(products), dtype=torch.int64),
            ),
            products=_tensor(products),
            log_share=torch.from_numpy(self._log_share[products]),
        )

    def epochs(
        self, places: NDArray[np.int32], batch_size: int, steps: int, part: tuple[int, int]
    ) -> Iterator[Batch]:
        """A rank's batches, epoch after epoch, each in order of time.

        Args:
            places: of the purchases to train on.
            batch_size: of a rank.
            steps: how many batches.
            part: the rank, and how many there are.
        """
        rank, world_size = part
        per_step = batch_size * world_size
        per_epoch = len(places) // per_step
        for step in range(steps):
            begin = step % per_epoch * per_step + rank
            yield self.of_purchases(places[begin : begin + per_step : world_size])


def _tensor(values: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
