"""Traces from a DataLoader: any iterable of TorchRec's batches, or of ids by table."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from torchrec_cafe.profile.pieces import Bags, Samples


class LoaderSource:
    """What a callable returns: an iterable of batches.

    A batch is a ``KeyedJaggedTensor``, a tuple, list or object that has one (``sparse_features``
    of TorchRec's ``Batch``), or a mapping of ids by table: integer tensors or arrays ``[B]``, or
    ``[B, L]`` with as many ids for every sample. A KJT's keys are the names of the tables.

    Args:
        path: ``package.module:callable``.
        tables: name of the table by key; empty: all keys.
        num_samples: of all batches; ``None``: not known.
    """

    def __init__(
        self, path: str, tables: Mapping[str, str], num_samples: int | None = None
    ) -> None:
        """Import the callable; see the class.

        Raises:
            TypeError: if the callable returns no iterable.
            ValueError: if the path names no callable.
        """
        module_name, colon, name = path.partition(":")
        if not (module_name and colon and name):
            raise ValueError(f"the loader must be package.module:callable, got {path!r}")
        try:
            make = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"the loader must be package.module:callable, got {path!r}: {error}; is its "
                f"directory in PYTHONPATH?"
            ) from None
        if not callable(make):
            raise ValueError(f"the loader must be a callable, got {path!r}: {type(make).__name__}")
        batches = make()
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"the loader must return an iterable of batches, got {type(batches).__name__}"
            )
        self.name = path
        self.num_samples = num_samples
        self._batches = batches
        self._tables = tables

    def parts(self) -> Iterator[Samples]:
        """The samples in their order.

        Raises:
            TypeError: if a batch is none of the above.
            ValueError: if a table is missing, or numbers of samples differ.
        """
        for number, batch in enumerate(self._batches):
            where = f"{self.name}: batch {number}"
            bags = _bags_of(batch, where)
            for key in self._tables:
                if key not in bags:
                    raise ValueError(f"{where}: columns must be among {list(bags)}, got {key!r}")
            chosen = self._tables or {key: key for key in bags}
            sizes = {key: _size(bags[key]) for key in chosen}
            if len(set(sizes.values())) > 1:
                raise ValueError(f"{where}: tables must have as many samples each, got {sizes}")
            named = {table: bags[key] for key, table in chosen.items()}
            yield Samples(named, next(iter(sizes.values())))


def _size(bags: Bags) -> int:
    return len(bags.ids) if bags.lengths is None else len(bags.lengths)


def _bags_of(batch: Any, where: str) -> dict[str, Bags]:
    features = _keyed_jagged(batch)
    if features is not None:
        return {
            key: Bags(_integers(jagged.values(), where), _integers(jagged.lengths(), where))
            for key, jagged in features.to_dict().items()
        }
    if isinstance(batch, Mapping) and batch:
        return {str(name): _fixed(ids, f"{where}: {name!r}") for name, ids in batch.items()}
    raise TypeError(
        f"{where}: must have a KeyedJaggedTensor or be a mapping of ids by table, got "
        f"{type(batch).__name__}"
    )


def _keyed_jagged(batch: Any) -> Any:
    """The KJT of a batch, known by what it can do: importing TorchRec is for those who use it."""
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    for part in parts:
        features = getattr(part, "sparse_features", part)
        if hasattr(features, "stride") and hasattr(features, "to_dict"):
            return features
    return None


def _fixed(ids: Any, where: str) -> Bags:
    array = _integers(ids, where)
    if array.ndim == 2:
        lengths = np.full(len(array), array.shape[1], dtype=np.int64)
        return Bags(array.reshape(-1), lengths)
    if array.ndim != 1:
        raise ValueError(f"{where} must have shape [B] or [B, L], got {array.shape}")
    return Bags(array)


def _integers(ids: Any, where: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{where} must have integers, got {array.dtype}")
    return array.astype(np.int64, copy=False)
