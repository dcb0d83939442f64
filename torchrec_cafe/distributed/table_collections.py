"""TorchRec's two kinds of collections, alike: pooled bags, and vectors of ids (sequences)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

Collection: TypeAlias = EmbeddingBagCollection | EmbeddingCollection
TableConfig: TypeAlias = EmbeddingBagConfig | EmbeddingConfig

#: The collections that can have tables with a kind.
COLLECTIONS: tuple[type[Collection], ...] = (EmbeddingBagCollection, EmbeddingCollection)


def configs_of(collection: Collection) -> Sequence[TableConfig]:
    """The tables of a collection, not copied."""
    if isinstance(collection, EmbeddingBagCollection):
        return collection.embedding_bag_configs()
    return collection.embedding_configs()


def modules_of(collection: Collection) -> Any:
    """The modules that have a collection's weights, by name of the table; mutable."""
    if isinstance(collection, EmbeddingBagCollection):
        return collection.embedding_bags
    return collection.embeddings


def module_of(collection: Collection, name: str) -> nn.Module:
    """The module that has a table's weights."""
    return modules_of(collection)[name]


def pooling_of(config: TableConfig) -> PoolingType:
    """How the ids of a bag are pooled; ``NONE`` if each has its own vector."""
    return config.pooling if isinstance(config, EmbeddingBagConfig) else PoolingType.NONE
