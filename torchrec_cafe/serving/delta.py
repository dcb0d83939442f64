"""What has changed in a model since it was exported, and how a served module takes it over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

from torchrec_cafe.serving.collection import (
    PhysicalBags,
    ServedEmbeddingBagCollection,
    quantize_rows,
    quantized_bags,
)


@dataclass(frozen=True)
class RowsDelta:
    """Rows that have changed.

    Attributes:
        rows: int64 ``[n]``, ascending.
        values: ``[n, ...]``, what they are now, in full precision.
    """

    rows: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class GroupDelta:
    """What has changed in a group of compressed tables.

    Attributes:
        rows: physical rows, looked up in training or moved by promotion and demotion.
        weights: rows of weights of factors; ``None`` where ids have no factors.
        buckets: buckets of the map from ids to rows; ``None`` without hot rows.
        became_hot: by table, int64 ``[n]``, ids that own a row and did not.
        stopped_being_hot: by table, int64 ``[n]``, ids that owned a row and do not.
    """

    rows: RowsDelta
    weights: RowsDelta | None
    buckets: RowsDelta | None
    became_hot: Mapping[str, Tensor]
    stopped_being_hot: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CollectionDelta:
    """What has changed in a collection.

    Attributes:
        groups: by name of the group.
        tables: rows of tables that are not compressed, by name.
    """

    groups: Mapping[str, GroupDelta]
    tables: Mapping[str, RowsDelta]


@dataclass(frozen=True, kw_only=True)
class ModelDelta:
    """What has changed in a model; can be saved by ``torch.save``.

    Attributes:
        since: version that it starts from.
        version: version that it leads to.
        collections: by name of the module.
        others: all other parameters and buffers, as they are now.
    """

    since: int
    version: int
    collections: Mapping[str, CollectionDelta]
    others: Mapping[str, Tensor]


def apply_delta(model: nn.Module, delta: ModelDelta) -> None:
    """Bring a served model up to date; it then predicts as one that is exported anew.

    Rows are quantised as the model's are. No lookups may run meanwhile.

    Args:
        model: what :meth:`torchrec_cafe.DeltaTracker.to_inference` has returned, also after it was
            saved and loaded, but not scripted; mutated.
        delta: from a version up to the model's to a later one.

    Raises:
        ValueError: if the model has not the collections of the delta, or not its version; nothing
            is changed then.
    """
    modules = {}
    for name in delta.collections:
        module = dict(model.named_modules()).get(name)
        if not isinstance(module, ServedEmbeddingBagCollection):
            raise ValueError(
                f"the model must have a ServedEmbeddingBagCollection at {name!r}, got "
                f"{type(module).__name__}; apply the delta to the model that to_inference returned"
            )
        version = int(module.version)
        if not delta.since <= version <= delta.version:
            raise ValueError(
                f"the delta leads from version {delta.since} to {delta.version}, but {name!r} has "
                f"version {version}; apply the deltas before it, or export the model anew"
            )
        modules[name] = module
    for name, module in modules.items():
        _apply(module, delta.collections[name])
        module.version.fill_(delta.version)
    model.load_state_dict(dict(delta.others), strict=False)


def _apply(module: ServedEmbeddingBagCollection, delta: CollectionDelta) -> None:
    for bags in module.groups:
        assert isinstance(bags, PhysicalBags)
        of_group = delta.groups[bags.name]
        _write(bags.bags, bags.name, of_group.rows)
        for name, changed in (("weights", of_group.weights), ("buckets", of_group.buckets)):
            if changed is not None and len(changed.rows) > 0:
                whole = bags.row_map.get_buffer(name)
                whole.view(-1, changed.values.shape[1])[changed.rows] = changed.values
    for other in module.others:
        assert isinstance(other, QuantEmbeddingBagCollection)
        for config in other.embedding_bag_configs():
            _write(other, config.name, delta.tables[config.name])


def _write(bags: QuantEmbeddingBagCollection, name: str, delta: RowsDelta) -> None:
    """Quantise rows and write them where the bags have theirs."""
    if len(delta.rows) == 0:
        return
    (config,) = (config for config in bags.embedding_bag_configs() if config.name == name)
    quantized = {name: quantize_rows(delta.values, config.data_type)}
    # Stock bags of these rows only have them in the very form that the larger ones have.
    few = quantized_bags([config], quantized, config.data_type, is_weighted=False)
    bags.embedding_bags[name].get_buffer("weight")[delta.rows] = few.embedding_bags[
        name
    ].get_buffer("weight")
