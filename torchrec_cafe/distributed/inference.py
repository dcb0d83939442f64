"""A trained, sharded model for inference: its tables in one place, quantised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    PoolingType,
    dtype_to_data_type,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table

from torchrec_cafe.distributed._torchrec import (
    ShardedEmbeddingBagCollection,
    kernels_of,
    process_group_of,
    tables_of,
    takes_weights,
)
from torchrec_cafe.distributed.data_parallel import DenseMemRecEmbeddingBag
from torchrec_cafe.distributed.embedding import ShardedCompressedEmbeddingCollection
from torchrec_cafe.distributed.embedding_bag import ShardedCompressedEmbeddingBagCollection
from torchrec_cafe.distributed.gathered import (
    Part,
    compressed_groups,
    gather,
    gather_group,
)
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.types import CompressedGroup
from torchrec_cafe.serving import (
    GroupFeatures,
    PhysicalBags,
    ServedEmbeddingBagCollection,
    quantize_rows,
    quantized_bags,
)

_DATA_TYPES = (DataType.FP32, DataType.FP16, DataType.INT8)


def to_inference(
    model: nn.Module, unsharded: nn.Module, *, dtype: torch.dtype = torch.int8, rank: int = 0
) -> nn.Module | None:
    """Bring a trained model together for inference; every rank has to call it.

    Compressed tables become a map from ids to physical rows in front of TorchRec's quantised
    ``EmbeddingBagCollection``; other tables become quantised bags as they are. That takes, on
    ``rank``, what the kinds say is resident, with rows of ``dtype``; of tables that are not
    compressed, one at a time is there in full precision.

    Args:
        model: sharded by ``DistributedModelParallel``. What the last step has taught is applied.
        unsharded: the model as it was before it was sharded, its dense layers on the CPU (its
            collections may be on the meta device). On ``rank`` it is mutated: its collections are
            replaced by a :class:`torchrec_cafe.serving.ServedEmbeddingBagCollection`, everything
            else is loaded.
        dtype: of the rows: ``torch.float32``, ``torch.float16`` or ``torch.int8`` (with a scale and
            an offset for each row).
        rank: which rank gets the model.

    Returns:
        ``unsharded``, in eval mode, on ``rank``; ``None`` on others.

    Raises:
        ValueError: if ``dtype`` is another; if the models do not fit each other, naming the key; or
            if an id of a table has no vector of its own, as in ``MemRec(per="sample")``.
    """
    data_type = data_type_of(dtype)
    refuse_sequences(model, "to_inference serves")
    named = dict(get_unwrapped_module(model).named_modules())
    collections = {
        name: module
        for name, module in named.items()
        if isinstance(module, ShardedEmbeddingBagCollection)
    }
    for name in collections:
        found = dict(unsharded.named_modules()).get(name)
        if not isinstance(found, EmbeddingBagCollection):
            raise ValueError(
                f"`unsharded` must have an EmbeddingBagCollection at {name!r}, as the sharded "
                f"model, got {type(found).__name__}; build it as the model was built"
            )
    served = {name: serve(module, data_type, rank) for name, module in collections.items()}
    state = model.state_dict()
    if dist.get_rank() != rank:
        return None
    for name, module in served.items():
        assert module is not None
        if name == "":
            return module.eval()
        parent, _, last = name.rpartition(".")
        setattr(unsharded.get_submodule(parent), last, module)
    _load_others(unsharded, state, collections)
    return unsharded.eval()


def data_type_of(dtype: torch.dtype) -> DataType:
    """TorchRec's name of a dtype of quantised rows.

    Raises:
        ValueError: if rows cannot have it.
    """
    data_type = dtype_to_data_type(dtype) if dtype in (
        torch.float32, torch.float16, torch.int8
    ) else None  # fmt: skip
    if data_type not in _DATA_TYPES:
        raise ValueError(f"`dtype` must be torch.float32, torch.float16 or torch.int8, got {dtype}")
    return data_type


def other_state(state: Mapping[str, Any], collections: Iterable[str]) -> dict[str, Tensor]:
    """What a model's state dict has besides its collections.

    Args:
        state: of the sharded model.
        collections: their names.
    """
    prefixes = tuple(f"{name}." for name in collections)
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and not key.startswith(prefixes)
    }


def _load_others(
    unsharded: nn.Module, state: Mapping[str, Any], collections: Iterable[str]
) -> None:
    others = other_state(state, collections)
    wanted = other_state(unsharded.state_dict(), collections).keys()
    if wanted != others.keys():
        raise ValueError(
            f"`unsharded` must have the same parameters as the sharded model, but differs in "
            f"{sorted(wanted ^ others.keys())}; build it as the model was built"
        )
    unsharded.load_state_dict(others, strict=False)


def serve(
    module: ShardedEmbeddingBagCollection, data_type: DataType, rank: int
) -> ServedEmbeddingBagCollection | None:
    """A sharded collection for inference; every rank has to call it.

    Args:
        module: the collection.
        data_type: of the rows.
        rank: of the module's group, gets it.

    Returns:
        The collection, ``None`` on other ranks.

    Raises:
        ValueError: if an id of a table has no vector of its own.
    """
    configs = [config for config in tables_of(module) if config.feature_names]
    names = dict(zip([c.name for c in configs], get_embedding_names_by_table(configs), strict=True))
    groups, compressed = [], set()
    if isinstance(module, ShardedCompressedEmbeddingBagCollection):
        for group in compressed_groups(module):
            tables = {table.name for table in group.tables}
            compressed |= tables
            members = [config for config in configs if config.name in tables]
            bags = _serve_group(module, group, members, data_type, rank)
            groups.append((bags, [name for c in members for name in names[c.name]]))
    others = []
    for pooling in PoolingType:
        own = [c for c in configs if c.name not in compressed and c.pooling is pooling]
        if own:
            weighted = takes_weights(module)
            bags = _serve_own(module, own, data_type, rank, is_weighted=weighted)
            others.append((bags, [name for c in own for name in names[c.name]]))
    if dist.get_rank(process_group_of(module)) != rank:
        return None
    embeddings = [(name, c.embedding_dim) for c in configs for name in names[c.name]]
    return ServedEmbeddingBagCollection(
        groups, others, [name for name, _ in embeddings], [dim for _, dim in embeddings]
    )


def _serve_group(
    module: ShardedCompressedEmbeddingBagCollection,
    group: CompressedGroup,
    configs: Sequence[EmbeddingBagConfig],
    data_type: DataType,
    rank: int,
) -> PhysicalBags | None:
    view = gather_group(module, group, to=rank)
    if view is None:
        return None
    features = [(name, config.name) for config in configs for name in config.feature_names]
    return PhysicalBags(
        GroupFeatures(
            name=group.name,
            features=tuple(name for name, _ in features),
            embedding_dim=configs[0].embedding_dim,
            is_weighted=takes_weights(module),
            pooling=configs[0].pooling,
        ),
        view.row_map([table for _, table in features]),
        view.rows,
        data_type,
    )


def _serve_own(
    module: ShardedEmbeddingBagCollection,
    configs: Sequence[EmbeddingBagConfig],
    data_type: DataType,
    rank: int,
    *,
    is_weighted: bool,
) -> Any:
    """Tables that are not compressed, quantised one by one."""
    group = process_group_of(module)
    for kernel in kernels_of(module):
        kernel.flush()
    quantized = {}
    for config in configs:
        whole = gather(list(own_parts(module, config.name)), group, to=rank)
        quantized |= {name: quantize_rows(rows, data_type) for name, rows in whole.items()}
    if dist.get_rank(group) != rank:
        return None
    return quantized_bags(configs, quantized, data_type, is_weighted=is_weighted)


def refuse_sequences(model: nn.Module, does: str) -> None:
    """Refuse a model in which sequences have tables with a kind.

    Args:
        model: sharded.
        does: who refuses and what it does, for the message.

    Raises:
        ValueError: naming the tables.
    """
    for module in model.modules():
        if isinstance(module, ShardedCompressedEmbeddingCollection):
            names = sorted(table.name for group in module.groups for table in group.tables)
            raise ValueError(
                f"tables {names}: {does} no EmbeddingCollection whose tables have `table=`; export "
                "it uncompressed with torchrec_cafe.dense_state_dict"
            )


def own_parts(module: ShardedEmbeddingBagCollection, name: str) -> Iterator[Part]:
    """What this rank has of a table that is not compressed.

    Args:
        module: that has the table.
        name: of the table.
    """
    for kernel in kernels_of(module):
        if isinstance(kernel, CompressedEmbeddingBag | DenseMemRecEmbeddingBag):
            continue
        weights: list[Tensor] = kernel.split_embedding_weights()
        for table, rows in zip(kernel.config.embedding_tables, weights, strict=True):
            if table.name == name:
                at = table.local_metadata
                yield Part(name, (0, 0) if at is None else tuple(at.shard_offsets), rows)
