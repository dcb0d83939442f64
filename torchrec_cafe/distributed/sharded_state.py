"""What checkpoints hold besides rows: sharded tensors by virtual shard, and layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharding_spec import ShardMetadata

from torchrec_cafe.distributed._torchrec import (
    ShardedTensor,
    ShardedTensorMetadata,
    TensorProperties,
    sharded_tensor,
)
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.layout import layout_tensors, take_layouts


def _shard_metadata(kernel: CompressedEmbeddingBag, tensor: Tensor) -> list[ShardMetadata]:
    """Where each rank's part of a state tensor lies: as its hot rows, in whole shards."""
    rest = list(tensor.shape[1:])
    per_shard = kernel.group.pool_rows_per_shard
    hot_rows = kernel.config.embedding_tables[-1].global_metadata
    assert hot_rows is not None
    return [
        ShardMetadata(
            shard_offsets=[shard.shard_offsets[0] // per_shard, *[0] * len(rest)],
            shard_sizes=[shard.shard_sizes[0] // per_shard, *rest],
            placement=shard.placement,
        )
        for shard in hot_rows.shards_metadata
    ]


def _sharded_state(kernel: CompressedEmbeddingBag, prefix: str) -> dict[str, ShardedTensor]:
    """The kernel's state as sharded tensors that share its memory.

    Args:
        kernel: a kernel; of tables that keep nothing but rows the result is empty.
        prefix: what goes before the name of the pool.

    Returns:
        ``{prefix}{pool}.{name}`` for each tensor.
    """
    state = kernel.bags.state
    if state is None:
        return {}
    first = state.first_shard
    result = {}
    for name, tensor in state.state_tensors().items():
        shards = _shard_metadata(kernel, tensor)
        mine = next(
            s for s in shards if s.shard_offsets[0] == first and s.shard_sizes[0] == len(tensor)
        )
        metadata = ShardedTensorMetadata(
            shards_metadata=shards,
            size=torch.Size([kernel.group.num_shards, *tensor.shape[1:]]),
            tensor_properties=TensorProperties(dtype=tensor.dtype),
        )
        key = f"{prefix}{kernel.group.name}.{name}"
        result[key] = sharded_tensor(tensor, mine, metadata, kernel)
    return result


def _load_state(
    kernel: CompressedEmbeddingBag, state_dict: dict[str, Any], prefix: str
) -> list[str]:
    """Copy a checkpoint's state into the kernel and take it out of ``state_dict``.

    Args:
        kernel: a kernel, mutated.
        state_dict: mutated: the state's entries are removed.
        prefix: what goes before the name of the pool.

    Returns:
        Keys that the kernel needs and ``state_dict`` lacks.

    Raises:
        ValueError: if a tensor has another shape; nothing is copied then.
    """
    state = kernel.bags.state
    if state is None:
        return []
    missing, loaded = [], []
    for name, tensor in state.state_tensors().items():
        key = f"{prefix}{kernel.group.name}.{name}"
        if key not in state_dict:
            missing.append(key)
            continue
        value = state_dict.pop(key)
        if isinstance(value, ShardedTensor):
            value = value.local_tensor()
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(
                f"pool {kernel.group.name!r}: {key!r} must be {tensor.dtype} of shape "
                f"{list(tensor.shape)}, got {value.dtype} of shape {list(value.shape)}; load it "
                "into tables of the same kind and size"
            )
        loaded.append((tensor, value))
    for tensor, value in loaded:
        tensor.copy_(value)
    state.reload()
    return missing


def add_state(
    module: Any, destination: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    """Hook of a sharded collection's ``state_dict``: adds what TorchRec does not know of.

    Args:
        module: the sharded collection.
        destination: mutated: gets the layouts of tables, and the state of groups.
        prefix: of the collection's keys.
    """
    prefix += f"{module.tables_name}."
    for name, tensor in layout_tensors(module.groups).items():
        destination[prefix + name] = tensor
    for kernel in module.compressed_kernels():
        destination.update(_sharded_state(kernel, prefix))


def take_state(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: dict[str, Any],
    strict: bool,  # noqa: FBT001  torch's signature
    missing_keys: list[str],
    *_args: Any,
) -> None:
    """Hook of a sharded collection's ``load_state_dict``: takes back what :func:`add_state` adds.

    Args:
        module: the sharded collection, mutated.
        state_dict: mutated: what was added is removed.
        prefix: of the collection's keys.
        strict: whether keys that are missing are an error.
        missing_keys: mutated: gets them.

    Raises:
        ValueError: if a table was kept in another way; nothing is copied then.
    """
    prefix += f"{module.tables_name}."
    missing = take_layouts(module.groups, state_dict, prefix)
    for kernel in module.compressed_kernels():
        missing += _load_state(kernel, state_dict, prefix)
    if strict:
        missing_keys += missing
