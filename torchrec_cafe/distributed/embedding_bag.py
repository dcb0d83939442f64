"""``EmbeddingBagCollection`` with compressed tables: sharder and sharded module."""

from __future__ import annotations

from typing import Any, cast

from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TorchRecSharder
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed._torchrec import (
    EmbeddingShardingInfo,
    ShardedEmbeddingBagCollection,
    input_dist_of_no_samples,
    kernels_of,
    lookups_of,
    pool_means_once,
    present_tables,
)
from torchrec_cafe.distributed.data_parallel import (
    CompressedDpPooledEmbeddingSharding,
    DenseMemRecEmbeddingBag,
)
from torchrec_cafe.distributed.input import InputCheck
from torchrec_cafe.distributed.lookahead import (
    LOOKAHEAD_SHARDINGS,
    LookaheadGroupedPooledEmbeddingsLookup,
)
from torchrec_cafe.distributed.physical import PhysicalEmbeddingBagCollection
from torchrec_cafe.distributed.row_wise import CompressedRwPooledEmbeddingSharding
from torchrec_cafe.distributed.sharded_collection import (
    OwnSharder,
    ShardedCompressedCollection,
    group_of_infos,
)
from torchrec_cafe.distributed.table_row_wise import CompressedTwRwPooledEmbeddingSharding
from torchrec_cafe.distributed.table_wise import CompressedTwPooledEmbeddingSharding

_SHARDINGS: dict[str, Any] = {
    ShardingType.ROW_WISE.value: CompressedRwPooledEmbeddingSharding,
    ShardingType.TABLE_WISE.value: CompressedTwPooledEmbeddingSharding,
    ShardingType.TABLE_ROW_WISE.value: CompressedTwRwPooledEmbeddingSharding,
}


class ShardedCompressedEmbeddingBagCollection(
    ShardedCompressedCollection, ShardedEmbeddingBagCollection
):
    """TorchRec's sharded collection, in which some tables are compressed.

    Args:
        module: the physical collection.
        env: process groups.
        options: further arguments of TorchRec's class.

    """

    tables_name = "embedding_bags"

    def __init__(
        self, module: PhysicalEmbeddingBagCollection, env: ShardingEnv, **options: Any
    ) -> None:
        """Shard; see the class."""
        physical = module.physical
        super().__init__(module, physical.plan, env, **options)
        # Ids are those of the uncompressed tables.
        present_tables(self, cast(Any, physical.logical_configs))
        pool_means_once(self)
        self._check_input = InputCheck(physical.logical_configs)
        for kernel in kernels_of(self):
            if isinstance(kernel, DenseMemRecEmbeddingBag):
                pool = self.embedding_bags[kernel.group.name]
                pool.register_parameter("weight_table", kernel.bags.weights)
        self.keep_groups(physical)

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Our sharding for compressed tables, TorchRec's for the others."""
        group = group_of_infos(sharding_infos)
        if group is None:
            return super().create_embedding_bag_sharding(sharding_infos, env, *args, **kwargs)
        device = args[0] if args else kwargs.get("device")
        sharding_type = sharding_infos[0].param_sharding.sharding_type
        if sharding_type == ShardingType.DATA_PARALLEL.value:  # no communication to encode
            return CompressedDpPooledEmbeddingSharding(sharding_infos, env, device)
        shardings = LOOKAHEAD_SHARDINGS if group.looks_ahead else _SHARDINGS
        return shardings[sharding_type](
            sharding_infos,
            env,
            device,
            qcomm_codecs_registry=kwargs.get("qcomm_codecs_registry"),
        )

    def input_dist(self, ctx: Any, features: Any) -> Any:
        """Begin to send the ids of a batch to where their rows lie.

        Args:
            ctx: as TorchRec's.
            features: as TorchRec's; of what is no ``KeyedJaggedTensor`` nothing is checked.

        Raises:
            TypeError: as :class:`InputCheck`; nothing has been sent then.
            ValueError: as :class:`InputCheck`.
        """
        if isinstance(features, KeyedJaggedTensor):
            self._check_input(features)
            if features.stride() == 0:
                return input_dist_of_no_samples(self, ctx, features)
        return super().input_dist(ctx, features)

    def look_ahead(self, features: Any) -> None:
        """Begin to bring in the rows of look-ahead tables that a coming batch needs.

        Args:
            features: what the input dist has given for it; :meth:`compute_and_output_dist` will be
                given the same.
        """
        for lookup, part in zip(lookups_of(self), features, strict=True):
            if isinstance(lookup, LookaheadGroupedPooledEmbeddingsLookup):
                lookup.prefetch(part)


class EmbeddingBagCollectionSharder(OwnSharder, TorchRecSharder):
    """Drop-in for TorchRec's sharder that understands compressed tables; see the base class."""

    def shard_compressed(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        **options: Any,
    ) -> ShardedEmbeddingBagCollection:
        """Shard pooled bags; see :meth:`OwnSharder.shard_compressed`."""
        return ShardedCompressedEmbeddingBagCollection(
            PhysicalEmbeddingBagCollection(module, params),
            env,
            fused_params=self.fused_params,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
            **options,
        )
