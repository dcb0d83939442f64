"""All contact with TorchRec beyond its documented public interface.

Every name that TorchRec does not promise to keep is imported or read here and nowhere else;
``tests/distributed/test_torchrec_contact.py`` checks that each still exists.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import (
    BaseBatchedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.composable.table_batched_embedding_slice import (
    TableBatchedEmbeddingSlice,
)
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_lookup import (
    GroupedEmbeddingsLookup,
    GroupedPooledEmbeddingsLookup,
)
from torchrec.distributed.embedding_sharding import (
    EmbeddingShardingInfo,
    bucketize_kjt_before_all2all,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.estimator import HardwarePerfConfig, ShardPerfContext
from torchrec.distributed.planner.estimator.estimator import (
    get_embedding_perf_sharding_evaluator,
)
from torchrec.distributed.planner.types import ParameterConstraints as TorchRecConstraints
from torchrec.distributed.planner.types import ShardEstimator, Topology
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name
from torchrec.distributed.sharding.dp_sharding import (
    DpPooledEmbeddingSharding,
    DpSparseFeaturesDist,
)
from torchrec.distributed.sharding.rw_sequence_sharding import RwSequenceEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import (
    RwPooledEmbeddingDist,
    RwPooledEmbeddingSharding,
    RwSparseFeaturesDist,
)
from torchrec.distributed.sharding.tw_sequence_sharding import TwSequenceEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import (
    TwPooledEmbeddingSharding,
    TwSparseFeaturesDist,
)
from torchrec.distributed.sharding.twrw_sharding import (
    TwRwPooledEmbeddingDist,
    TwRwPooledEmbeddingSharding,
    TwRwSparseFeaturesDist,
)
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import PrefetchTrainPipelineContext
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.fused import FusedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

__all__ = [
    "BaseBatchedEmbeddingBag",
    "DpPooledEmbeddingSharding",
    "DpSparseFeaturesDist",
    "EmbeddingFusedOptimizer",
    "EmbeddingShardingInfo",
    "GroupedEmbeddingConfig",
    "GroupedEmbeddingsLookup",
    "GroupedPooledEmbeddingsLookup",
    "PrefetchTrainPipelineContext",
    "PrefetchTrainPipelineSparseDist",
    "RwPooledEmbeddingDist",
    "RwPooledEmbeddingSharding",
    "RwSequenceEmbeddingSharding",
    "RwSparseFeaturesDist",
    "ShardedEmbeddingBagCollection",
    "ShardedEmbeddingCollection",
    "ShardedEmbeddingTable",
    "ShardedTensor",
    "ShardedTensorMetadata",
    "TableBatchedEmbeddingSlice",
    "Topology",
    "TensorProperties",
    "TorchRecConstraints",
    "TwPooledEmbeddingSharding",
    "TwRwPooledEmbeddingDist",
    "TwRwPooledEmbeddingSharding",
    "TwRwSparseFeaturesDist",
    "TwSequenceEmbeddingSharding",
    "TwSparseFeaturesDist",
    "cut_by_boundaries",
    "default_backward_compute",
    "default_forward_compute",
    "estimate_options",
    "input_dist_of_no_samples",
    "kernels_of",
    "kernels_of_lookup",
    "lookups_of",
    "mark_trained_in_backward",
    "partition_by",
    "pool_means_once",
    "present_tables",
    "process_group_of",
    "ranks_of_a_host",
    "reserved_topology",
    "receive_input",
    "sequence_options",
    "set_row_boundaries",
    "sharded_copy",
    "sharded_tensor",
    "staggered",
    "tables_of",
    "takes_weights",
    "with_constraints",
    "without_ids",
]


def lookups_of(module: Any) -> list[nn.Module]:
    """The lookups of a sharded module, without their DDP wrapper."""
    return [
        lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
        for lookup in module._lookups
    ]


def kernels_of(module: Any) -> Iterator[BaseBatchedEmbeddingBag[Any]]:
    """The kernels of all lookups of a sharded module."""
    for lookup in lookups_of(module):
        modules: Any = lookup._emb_modules
        yield from modules


def kernels_of_lookup(
    lookup: GroupedPooledEmbeddingsLookup, features: KeyedJaggedTensor
) -> Iterator[tuple[Any, KeyedJaggedTensor]]:
    """The kernels of a lookup, each with its part of the features."""
    modules: Any = lookup._emb_modules
    yield from zip(modules, features.split(lookup._feature_splits), strict=True)


def mark_trained_in_backward(parameter: Any, optimizer: FusedOptimizer) -> None:
    """Tell TorchRec that a parameter's optimizer runs inside the backward pass."""
    parameter._in_backward_optimizers = [optimizer]


def sharded_tensor(
    local: Tensor, mine: ShardMetadata, metadata: ShardedTensorMetadata, kernel: Any
) -> ShardedTensor:
    """A sharded tensor around a local tensor, without communication."""
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=[Shard(local, mine)],
        sharded_tensor_metadata=metadata,
        process_group=kernel._pg,
    )


def sharded_copy(original: ShardedTensor, copied: Callable[[Tensor], Tensor]) -> ShardedTensor:
    """A sharded tensor of the same metadata around copies of the local shards."""
    shards = [Shard(copied(shard.tensor), shard.metadata) for shard in original.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=shards,
        sharded_tensor_metadata=original.metadata(),
        process_group=original._process_group,
    )


def receive_input(
    pipeline: PrefetchTrainPipelineSparseDist[Any, Any],
    module: Any,
    context: PrefetchTrainPipelineContext,
) -> Any:
    """Wait for the ids that a pipelined module gets in a batch, and leave them for its forward.

    TorchRec's own ``prefetch_embeddings`` does nothing without a CUDA stream.
    """
    name = module.forward.name
    with pipeline._stream_context(pipeline._data_dist_stream):  # pyright: ignore[reportArgumentType]
        ids = context.input_dist_tensors_requests.pop(name).wait()
    module_context = context.module_contexts.pop(name)
    if pipeline._data_dist_stream is not None:
        current = torch.get_device_module(pipeline._device).current_stream()
        current.wait_stream(pipeline._data_dist_stream)
        ids.record_stream(current)
        module_context.record_stream(current)
    context.module_input_post_prefetch[name] = ids
    context.module_contexts_post_prefetch[name] = module_context
    return ids


def partition_by(sharding_type: str) -> str:
    """What a planner's partitioner places as one: a device, a host, or all."""
    return get_partition_by_type(sharding_type)


def estimate_options(estimator: Any, options: list[Any], sharder: Any) -> None:
    """Let an estimator of TorchRec price sharding options; it writes into them.

    Later versions of TorchRec take what a sharder says of itself instead of the sharder.

    Args:
        estimator: of time or of storage.
        options: of modules that ``sharder`` shards.
        sharder: TorchRec's or ours.
    """
    sharders = {sharder_name(sharder.module_type): sharder}
    if "sharder_data_map" in inspect.signature(ShardEstimator.estimate).parameters:
        estimator.estimate(options, sharder_data_map=build_sharder_data_map(sharders))
    else:
        estimator.estimate(options, sharder_map=sharders)


def ranks_of_a_host(topology: Topology) -> int:
    """Ranks that table-row-wise tables are spread over; a domain of NVLink, since TorchRec 1.8."""
    return getattr(topology, "intra_group_size", topology.local_world_size)


def process_group_of(module: Any) -> Any:
    """The ranks that a sharded module is spread over."""
    return module._env.process_group


def tables_of(module: Any) -> list[Any]:
    """The tables of a sharded module."""
    if isinstance(module, ShardedEmbeddingCollection):
        return module._embedding_configs
    return module._embedding_bag_configs


def takes_weights(module: ShardedEmbeddingBagCollection) -> bool:
    """Whether the features of a sharded module have per-sample weights."""
    return module._is_weighted


def present_tables(
    module: ShardedEmbeddingBagCollection, configs: list[EmbeddingBagConfig]
) -> None:
    """Set the tables that a sharded module validates its input against."""
    module._embedding_bag_configs = configs


def pool_means_once(module: ShardedEmbeddingBagCollection) -> None:
    """Keep the means of tables that are whole on a rank from being divided again.

    Where one table of a module is row-wise and pooled by mean, TorchRec 1.8 divides the sums of all
    features but those that it knows to be sums, although it pools a whole table by mean itself.
    """
    by_pooling = module._pooling_type_to_rs_features
    divided_later = {feature for features in by_pooling.values() for feature in features}
    by_pooling[PoolingType.SUM.value] += [
        feature
        for config in module._embedding_bag_configs
        for feature in config.feature_names
        if feature not in divided_later
    ]


def sequence_options(collection: EmbeddingCollection) -> dict[str, Any]:
    """Arguments of a collection besides its tables and device; later versions have more of them."""
    names = inspect.signature(EmbeddingCollection.__init__).parameters.keys()
    return {name: getattr(collection, name)() for name in names - {"self", "tables", "device"}}


def without_ids(features: KeyedJaggedTensor, num_samples: int = 0) -> KeyedJaggedTensor:
    """A batch without ids, with the lengths that TorchRec's input dist cannot do without.

    Args:
        features: a batch of no samples.
        num_samples: of the result.
    """
    lengths = features.lengths_or_none()
    # Of the dtype of the other ranks' lengths, which gloo relies on.
    like = features.offsets() if lengths is None else lengths
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=like.new_zeros(num_samples * len(features.keys())),
        stride=num_samples,
    )


def input_dist_of_no_samples(
    module: ShardedEmbeddingBagCollection, ctx: Any, features: KeyedJaggedTensor
) -> Any:
    """The input dist of a rank that has no samples in a batch.

    TorchRec 1.8 can neither make the divisor of means then, nor do without lengths.
    """
    empty = without_ids(features)
    if not module._has_mean_pooling_callback:
        return ShardedEmbeddingBagCollection.input_dist(module, ctx, empty)
    is_first = module._has_uninitialized_input_dist
    module._has_mean_pooling_callback = False
    try:
        sent = ShardedEmbeddingBagCollection.input_dist(module, ctx, empty)
    finally:
        module._has_mean_pooling_callback = True
    if is_first:
        module._init_mean_pooling_callback(empty.keys(), None)
    ctx.divisor = torch.ones(1, device=empty.device())
    return sent


def set_row_boundaries(input_dist: RwSparseFeaturesDist, boundaries: list[Any]) -> None:
    """Make a row-wise input dist cut each feature's ids at the given boundaries.

    TorchRec has the mechanism (for tables with uneven buckets) but offers no constructor argument
    for it, and has renamed the attribute since 1.6.
    """
    for name in ("zch_bucketize_row_pos", "kvzch_bucketize_row_pos"):
        if hasattr(input_dist, name):
            setattr(input_dist, name, boundaries)
            return
    raise ImportError(
        "torchrec_cafe: this TorchRec's RwSparseFeaturesDist has no bucketize_row_pos; "
        "use TorchRec 1.6 to 1.8"
    )


def cut_by_boundaries(
    input_dist: TwRwSparseFeaturesDist, features: KeyedJaggedTensor, boundaries: list[Tensor]
) -> KeyedJaggedTensor:
    """Cut each feature's ids at the given boundaries, into parts for the ranks of a host.

    A table-row-wise input dist of TorchRec cuts at equal blocks only.
    """
    return bucketize_kjt_before_all2all(
        features,
        num_buckets=input_dist._local_size,
        block_sizes=input_dist._feature_block_sizes_tensor,  # pyright: ignore[reportArgumentType]
        block_bucketize_row_pos=boundaries,
    )[0]


def staggered(
    input_dist: TwRwSparseFeaturesDist, parts: KeyedJaggedTensor
) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
    """Send each part to its rank, as a table-row-wise input dist of TorchRec does."""
    order: Any = input_dist._sf_staggered_shuffle_tensor
    return input_dist._dist(parts.permute(input_dist._sf_staggered_shuffle, order))


def default_forward_compute(ctx: ShardPerfContext, config: HardwarePerfConfig) -> float:
    """TorchRec's estimate of a shard's forward pass, whatever the configuration overrides."""
    evaluator = get_embedding_perf_sharding_evaluator(ctx.sharding_type, ctx.is_inference)
    return evaluator._default_fwd_comp(ctx, config)


def default_backward_compute(ctx: ShardPerfContext, config: HardwarePerfConfig) -> float:
    """TorchRec's estimate of a shard's backward pass, whatever the configuration overrides."""
    evaluator = get_embedding_perf_sharding_evaluator(ctx.sharding_type, ctx.is_inference)
    return evaluator._default_bwd_comp(ctx, config)


def reserved_topology(reservation: Any) -> Topology | None:
    """What a storage reservation has left of the topology that it was last asked about."""
    return getattr(reservation, "_last_reserved_topology", None)


def with_constraints(enumerator: Any, constraints: dict[str, Any]) -> Any:
    """A copy of an enumerator that goes by other constraints.

    Raises:
        ValueError: if it does not keep constraints as TorchRec's does.
    """
    if not hasattr(enumerator, "_constraints"):
        raise ValueError(
            "`enumerator` must be a TorchRec EmbeddingEnumerator if tables have a kind or the "
            f"planner has `auto`, got {type(enumerator).__name__}; leave it out"
        )
    changed = copy.copy(enumerator)
    changed._constraints = constraints
    return changed
