"""What has changed in a sharded model, for models that serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_cafe.config import Cafe
from torchrec_cafe.distributed._torchrec import (
    ShardedEmbeddingBagCollection,
    kernels_of,
    kernels_of_lookup,
    lookups_of,
    process_group_of,
    tables_of,
)
from torchrec_cafe.distributed.embedding_bag import ShardedCompressedEmbeddingBagCollection
from torchrec_cafe.distributed.gathered import Part, compressed_groups, gather, gather_concat
from torchrec_cafe.distributed.inference import other_state, refuse_sequences, to_inference
from torchrec_cafe.distributed.touched import (
    FOLLOWED,
    Piece,
    TrackedKernel,
    buckets_of,
    rows_of,
    weights_of,
)
from torchrec_cafe.distributed.types import CompressedGroup
from torchrec_cafe.ops import unmix_ids
from torchrec_cafe.serving import (
    CollectionDelta,
    GroupDelta,
    ModelDelta,
    RowsDelta,
    ServedEmbeddingBagCollection,
)

# A key of a pool: the number of the table above, the mixed id below; see csrc/row_map.h.
_ID_BITS = 48


class DeltaTracker:
    """Follows which rows of a model are trained or moved, so that only these need to be exported.

    A row has a number of 4 bytes, the version in which it was last touched. In training a step
    writes those of its rows. Maps from ids to rows are compared when a version ends, and take as
    much memory as the sketch does.

    One tracker a model; it follows the model for good.

    Args:
        model: sharded by ``DistributedModelParallel``.

    Attributes:
        version: of the model when it was last exported, in full or not; 0 before.

    Raises:
        ValueError: if the model has a tracker.
    """

    def __init__(self, model: nn.Module) -> None:
        """Begin to follow; see the class."""
        refuse_sequences(model, "a DeltaTracker follows")
        self._model = model
        self.version = 0
        self._collections = {
            name: module
            for name, module in get_unwrapped_module(model).named_modules()
            if isinstance(module, ShardedEmbeddingBagCollection)
        }
        self._kernels: dict[str, list[TrackedKernel]] = {}
        for name, module in self._collections.items():
            if module in FOLLOWED:
                raise ValueError(f"{name!r} has a DeltaTracker already; use that one")
            FOLLOWED.add(module)
            kernels = [TrackedKernel(kernel) for kernel in kernels_of(module)]
            self._kernels[name] = kernels
            by_kernel = {id(tracked.kernel): tracked for tracked in kernels}
            for lookup in lookups_of(module):
                lookup.register_forward_pre_hook(_note_lookups(by_kernel))
            module.register_load_state_dict_post_hook(_note_all(kernels))

    def to_inference(
        self, unsharded: nn.Module, *, dtype: torch.dtype = torch.int8, rank: int = 0
    ) -> nn.Module | None:
        """A full export that deltas can be applied to: ends a version; every rank has to call it.

        Args:
            unsharded: as :func:`torchrec_cafe.to_inference` takes it.
            dtype: as there.
            rank: as there.

        Returns:
            As there.
        """
        self._end_version()
        served = to_inference(self._model, unsharded, dtype=dtype, rank=rank)
        if served is not None:
            for module in served.modules():
                if isinstance(module, ServedEmbeddingBagCollection):
                    module.version.fill_(self.version)
        return served

    def delta(self, since: int, *, rank: int = 0) -> ModelDelta | None:
        """What has changed after a version: ends one; every rank has to call it.

        Args:
            since: a version, in [0, :attr:`version`].
            rank: which rank gets it.

        Returns:
            The delta to the version that ends, on the CPU; ``None`` on other ranks.

        Raises:
            ValueError: if there was no such version.
        """
        if not 0 <= since <= self.version:
            raise ValueError(f"`since` must be in [0, {self.version}], got {since}")
        self._end_version()
        collections = {}
        for name, module in self._collections.items():
            of_module = self._collection_delta(name, module, since, rank)
            if of_module is not None:
                collections[name] = of_module
        others = other_state(self._model.state_dict(), self._collections)
        if dist.get_rank() != rank:
            return None
        return ModelDelta(
            since=since,
            version=self.version,
            collections=collections,
            others={name: value.detach().cpu().clone() for name, value in others.items()},
        )

    def _end_version(self) -> None:
        self.version += 1
        for kernels in self._kernels.values():
            for kernel in kernels:
                kernel.close(self.version)

    def _collection_delta(
        self, name: str, module: ShardedEmbeddingBagCollection, since: int, rank: int
    ) -> CollectionDelta | None:
        ranks = process_group_of(module)
        pieces = [piece for kernel in self._kernels[name] for piece in kernel.pieces(since)]
        groups, compressed = {}, set()
        if isinstance(module, ShardedCompressedEmbeddingBagCollection):
            for group in compressed_groups(module):
                compressed |= {table.name for table in group.tables}
                groups[group.name] = self._group_delta(name, group, pieces, since, rank)
        tables = {
            config.name: _rows_delta(config.name, pieces, ranks, rank)
            for config in tables_of(module)
            if config.feature_names and config.name not in compressed
        }
        if dist.get_rank(ranks) != rank:
            return None
        return CollectionDelta(groups=groups, tables=tables)

    def _group_delta(
        self, name: str, group: CompressedGroup, pieces: Sequence[Piece], since: int, rank: int
    ) -> GroupDelta:
        ranks = process_group_of(self._collections[name])
        has_hot_rows = isinstance(group.kind, Cafe) and group.has_pool
        no_keys = torch.empty(0, dtype=torch.int64)
        became, stopped = no_keys, no_keys
        for kernel in self._kernels[name]:
            if kernel.buckets is not None and kernel.kernel.group == group:
                became, stopped = kernel.buckets.hot_since(since)
        weights = group.weights_per_shard > 0
        return GroupDelta(
            rows=_rows_delta(rows_of(group), pieces, ranks, rank),
            weights=_rows_delta(weights_of(group), pieces, ranks, rank) if weights else None,
            buckets=_rows_delta(buckets_of(group), pieces, ranks, rank) if has_hot_rows else None,
            became_hot=_ids(group, gather_concat(became, ranks, to=rank)),
            stopped_being_hot=_ids(group, gather_concat(stopped, ranks, to=rank)),
        )


def _note_lookups(by_kernel: Mapping[int, TrackedKernel]) -> Callable[..., None]:
    def note(lookup: Any, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            for kernel, features in kernels_of_lookup(lookup, args[0]):
                by_kernel[id(kernel)].look_up(features)

    return note


def _note_all(kernels: Sequence[TrackedKernel]) -> Callable[..., None]:
    def note(_module: nn.Module, _keys: object) -> None:
        for kernel in kernels:
            kernel.touch_all()

    return note


def _rows_delta(
    name: str, pieces: Sequence[Piece], ranks: dist.ProcessGroup, rank: int
) -> RowsDelta:
    """The touched rows of all ranks; without values on ranks that do not get it."""
    mine = [piece for piece in pieces if piece.name == name]
    touched = [piece.touched.cpu() + piece.first[0] for piece in mine]
    no_rows = torch.empty(0, dtype=torch.int64)
    rows = gather_concat(torch.cat([no_rows, *touched]), ranks, to=None).unique()
    parts = []
    for piece in mine:
        begin, column = piece.first
        bounds = torch.tensor([begin, begin + len(piece.tensor)])
        first, last = torch.searchsorted(rows, bounds).tolist()
        wanted = (rows[first:last] - begin).to(piece.tensor.device)
        parts.append(Part(name, (first, column), piece.tensor.detach()[wanted]))
    whole = gather(parts, ranks, to=rank)
    return RowsDelta(rows, whole.get(name, torch.empty((0, 0))))


def _ids(group: CompressedGroup, keys: Tensor) -> dict[str, Tensor]:
    """The ids of keys, by table."""
    mixed, index = keys & ((1 << _ID_BITS) - 1), keys >> _ID_BITS
    return {
        table.name: unmix_ids(mixed[index == table.index], table.num_ids).sort().values
        for table in group.tables
        if table.index >= 0
    }
