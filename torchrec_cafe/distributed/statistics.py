"""What a sharded model keeps resident, and what its tables have done so far."""

from __future__ import annotations

from torch import Tensor, nn

from torchrec_cafe.distributed._torchrec import (
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
    kernels_of,
)
from torchrec_cafe.distributed.data_parallel import DenseMemRecEmbeddingBag
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.distributed.lookahead import LookaheadEmbeddingBag
from torchrec_cafe.distributed.sharded_collection import ShardedCompressedCollection
from torchrec_cafe.tables import LookaheadStatistics


def resident_bytes(module: nn.Module) -> int:
    """Bytes that the embedding tables of a sharded model keep resident on this rank.

    Weights, sketches and maps as they are allocated, compressed or not; optimizer state is not
    counted.

    Args:
        module: a model, sharded by ``DistributedModelParallel``.
    """
    total = 0
    for child in module.modules():
        if not isinstance(child, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
            continue
        for kernel in kernels_of(child):
            if isinstance(kernel, LookaheadEmbeddingBag):
                total += kernel.bags.resident_bytes
                continue
            weights: list[Tensor] = kernel.split_embedding_weights()
            total += sum(w.numel() * w.element_size() for w in weights)
            if isinstance(kernel, CompressedEmbeddingBag) and kernel.bags.state is not None:
                total += kernel.bags.state.num_bytes
            if isinstance(kernel, DenseMemRecEmbeddingBag):
                total += kernel.bags.weights.numel() * kernel.bags.weights.element_size()
    return total


def pool_statistics(module: nn.Module) -> dict[str, dict[str, float]]:
    """What the sketches of a sharded model have done so far, on this rank.

    Args:
        module: a model, sharded by ``DistributedModelParallel``.

    Returns:
        By name of the pool, the statistics of
        :meth:`torchrec_cafe.tables.HotRowPool.statistics`.
    """
    return {
        kernel.group.name: kernel.bags.pool.statistics()
        for child in module.modules()
        if isinstance(child, ShardedCompressedCollection)
        for kernel in child.compressed_kernels()
        if kernel.bags.pool is not None
    }


def lookahead_statistics(module: nn.Module) -> dict[str, LookaheadStatistics]:
    """What the look-ahead tables of a sharded model have done so far, on this rank.

    Args:
        module: a model, sharded by ``DistributedModelParallel``.

    Returns:
        By name of the group.
    """
    return {
        kernel.group.name: kernel.bags.statistics
        for child in module.modules()
        if isinstance(child, ShardedCompressedCollection)
        for kernel in child.lookahead_kernels()
    }
