"""``EmbeddingCollection`` (sequences) with compressed tables: sharder and sharded module."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.embedding import EmbeddingCollectionSharder as TorchRecSharder
from torchrec.distributed.embedding import get_ec_index_dedup
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    EmbeddingShardingInfo,
    ShardedEmbeddingCollection,
    without_ids,
)
from torchrec_cafe.distributed.input import InputCheck
from torchrec_cafe.distributed.physical import PhysicalEmbeddingCollection
from torchrec_cafe.distributed.row_wise import CompressedRwSequenceEmbeddingSharding
from torchrec_cafe.distributed.sharded_collection import (
    OwnSharder,
    ShardedCompressedCollection,
    group_of_infos,
)
from torchrec_cafe.distributed.table_wise import CompressedTwSequenceEmbeddingSharding
from torchrec_cafe.distributed.types import CompressedParameterSharding, sequence_sharding_types

_SHARDINGS: dict[str, Any] = {
    ShardingType.ROW_WISE.value: CompressedRwSequenceEmbeddingSharding,
    ShardingType.TABLE_WISE.value: CompressedTwSequenceEmbeddingSharding,
}


class ShardedCompressedEmbeddingCollection(ShardedCompressedCollection, ShardedEmbeddingCollection):
    """TorchRec's sharded collection of sequences, in which some tables are compressed.

    Args:
        module: the physical collection.
        env: process groups.
        options: further arguments of TorchRec's class.
    """

    tables_name = "embeddings"

    def __init__(
        self, module: PhysicalEmbeddingCollection, env: ShardingEnv, **options: Any
    ) -> None:
        """Shard; see the class."""
        super().__init__(module, module.physical.plan, env, **options)
        self._check_input = InputCheck(module.physical.logical_configs)
        self.keep_groups(module.physical)

    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Our sharding for compressed tables, TorchRec's for the others."""
        if group_of_infos(sharding_infos) is None:
            return super().create_embedding_sharding(sharding_type, sharding_infos, *args, **kwargs)
        return _SHARDINGS[sharding_infos[0].param_sharding.sharding_type](
            sharding_infos, *args, **kwargs
        )

    def input_dist(self, ctx: Any, features: Any) -> Any:
        """Begin to send the ids of a batch to where their rows lie.

        Args:
            ctx: as TorchRec's.
            features: as TorchRec's; of what is no ``KeyedJaggedTensor`` nothing is checked. Weights
                are ignored, as TorchRec does.

        Raises:
            TypeError: as :class:`InputCheck`; nothing has been sent then.
            ValueError: as :class:`InputCheck`.
        """
        if isinstance(features, KeyedJaggedTensor):
            self._check_input(features)
            if features.stride() == 0:
                # TorchRec cannot tell features apart then: it gets a sample without ids.
                ctx.has_no_samples = True
                features = without_ids(features, num_samples=1)
        return super().input_dist(ctx, features)

    def compute_and_output_dist(self, ctx: Any, input: Any) -> Any:  # noqa: A002  TorchRec's name
        """Look up, and begin to send vectors to where their ids came from.

        Args:
            ctx: as TorchRec's.
            input: what the input dist has given.
        """
        awaitable: Any = super().compute_and_output_dist(ctx, input)
        if getattr(ctx, "has_no_samples", False):
            awaitable.callbacks.append(_take_sample_back)
        return awaitable


def _take_sample_back(found: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
    """The vectors of a batch of no samples, of those of a sample without ids."""
    return {
        name: JaggedTensor(
            values=of_feature.values(),
            weights=of_feature.weights_or_none(),
            lengths=of_feature.lengths().new_empty(0),
        )
        for name, of_feature in found.items()
    }


class EmbeddingCollectionSharder(OwnSharder, TorchRecSharder):
    """Drop-in for TorchRec's sharder that understands compressed tables; see the base class."""

    def sharding_types_of(self, sharding: CompressedParameterSharding) -> tuple[str, ...]:
        """See :meth:`OwnSharder.sharding_types_of`."""
        return sequence_sharding_types(sharding.kind)

    @property
    def dedups(self) -> bool:
        """Whether ids are to be sent once a batch only."""
        return self._use_index_dedup or get_ec_index_dedup()

    def shard_compressed(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        **options: Any,
    ) -> ShardedEmbeddingCollection:
        """Shard sequences; see :meth:`OwnSharder.shard_compressed`.

        Raises:
            ValueError: if ids are to be sent once a batch only.
        """
        refuse_dedup(self, sorted(params))
        return ShardedCompressedEmbeddingCollection(
            PhysicalEmbeddingCollection(module, params),
            env,
            fused_params=self.fused_params,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            **options,
        )


def refuse_dedup(sharder: EmbeddingCollectionSharder, tables: list[str]) -> None:
    """Refuse to send ids once a batch only: the sketch is to see every occurrence of an id.

    Args:
        sharder: of the tables.
        tables: with a kind, for the message.

    Raises:
        ValueError: if that is asked for.
    """
    if sharder.dedups:
        raise ValueError(
            f"tables {tables}: tables with `table=` cannot have use_index_dedup=True, which hides "
            "how often an id occurs; leave it out of EmbeddingCollectionSharder, and "
            "set_ec_index_dedup uncalled"
        )
