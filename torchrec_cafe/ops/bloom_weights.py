"""The weights of MEM-REC: factors of ids, their gradient, and pooling with them.

Shape legend: N ids, F features, B samples, M rows, S virtual shards of a rank, W weights a shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor
from torchrec_cafe.ops.bloom import WEIGHTS_PER_ROW, BloomBits, explained


def bloom_weigh(
    weights: Tensor, ids: Tensor, offsets: Tensor, tables: Tensor, bits: BloomBits
) -> Tensor:
    """Add up the weights of each id; a weight that two hash functions hit counts once.

    Args:
        weights: float32 ``[S, W]``, ``bits.shards_held`` by ``bits.per_shard``.
        ids: as :func:`bloom_rows` takes them.
        offsets: as :func:`bloom_rows` takes them.
        tables: as :func:`bloom_rows` takes them.
        bits: where the weights lie; hash functions other than those of :func:`bloom_rows`.

    Returns:
        float32 ``[N]``, in the order of the ids.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: as :func:`bloom_rows`.

    Note:
        Deterministic, and the same on every device. Nothing is mutated. Not differentiable by
        autograd: see :func:`bloom_weigh_backward`.

    Reference: MEM-REC (ACML 2023), section 3: the weight encoder.
    """
    op = "bloom_weigh"
    _check_held(op, "weights", weights, (bits.shards_held, bits.per_shard))
    with explained(op, ids, offsets, tables, weights=weights):
        return torch.ops.torchrec_cafe.bloom_weigh.default(
            weights, ids, offsets, tables, bits.first_shard, bits.num_hashes
        )


def bloom_pool(  # noqa: PLR0913  both tables and a batch
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    *,
    row_bits: BloomBits,
    weight_bits: BloomBits,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Encode, look up, scale and pool in one pass, for inference.

    What FBGEMM's TBE gives for the rows of :func:`bloom_rows` with the factors of
    :func:`bloom_weigh`, up to the order of additions, without writing rows and factors to memory;
    token rows are asked for ahead of their use.

    Args:
        rows: float32 or float16 ``[row_bits.shards_held * row_bits.per_shard, D]``, token rows.
        weights: as :func:`bloom_weigh` takes them.
        ids: as :func:`bloom_rows` takes them.
        offsets: as :func:`bloom_rows` takes them.
        tables: as :func:`bloom_rows` takes them.
        row_bits: where the rows lie.
        weight_bits: where the weights lie.
        per_sample_weights: float32 ``[N]``, further factor of each id; ``None``: all one.

    Returns:
        float32 ``[B, F * D]``.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: as :func:`bloom_rows`.

    Note:
        Deterministic for any number of threads. Nothing is mutated. Not differentiable.

    Reference: MEM-REC (ACML 2023), section 3, ``z = alpha * M phi``.
    """
    op = "bloom_pool"
    floats = {} if per_sample_weights is None else {"per_sample_weights": per_sample_weights}
    _check_rows(op, rows, row_bits)
    _check_held(op, "weights", weights, (weight_bits.shards_held, weight_bits.per_shard))
    with explained(op, ids, offsets, tables, weights=weights, **floats):
        return torch.ops.torchrec_cafe.bloom_pool.default(
            rows,
            weights,
            ids,
            offsets,
            tables,
            weights.new_empty(0) if per_sample_weights is None else per_sample_weights,
            row_bits.first_shard,
            row_bits.num_hashes,
            weight_bits.num_hashes,
        )


def _check_rows(op: str, rows: Tensor, bits: BloomBits) -> None:
    """Check the token rows, which may have one of two dtypes."""
    if rows.dtype not in (torch.float32, torch.float16):
        raise TypeError(f"{op}: `rows` must be torch.float32 or torch.float16, got {rows.dtype}")
    _check_held(op, "rows", rows, (bits.shards_held * bits.per_shard, None))


def _check_held(op: str, name: str, tensor: Tensor, shape: tuple[int, int | None]) -> None:
    """Check that a table has the size that its bits say, which the operator cannot know."""
    if tensor.dim() != 2 or tensor.shape[0] != shape[0] or shape[1] not in (None, tensor.shape[1]):
        check_tensor(op, name, tensor, tensor.dtype, shape)


def bloom_weigh_backward(  # noqa: PLR0913  both tables and a batch
    grad: Tensor,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    *,
    row_bits: BloomBits,
    weight_bits: BloomBits,
    per_sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the weights, from that of the pooled bags, by rows of four weights.

    The factor of an id has the gradient of its bag times the sum of its token rows; each of its
    weights has that of the factor.

    Args:
        grad: float32 ``[B * F, D]``, of the pooled bags, sample-major.
        rows: as :func:`bloom_pool` takes them, as they were looked up.
        ids: as :func:`bloom_rows` takes them.
        offsets: as :func:`bloom_rows` takes them.
        tables: as :func:`bloom_rows` takes them.
        row_bits: where the rows lie.
        weight_bits: where the weights lie.
        per_sample_weights: as :func:`bloom_pool` takes them.

    Returns:
        int64 ``[U]``, rows of the weights viewed as ``[S * W / 4, 4]``; float32 ``[U, 4]``, their
        gradients. On a CPU the rows that the ids hit, each once, as first hit. On CUDA
        ``U = N * num_hashes`` and rows repeat: their gradients are to be added up, as FBGEMM does.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: as :func:`bloom_rows`.

    Note:
        Deterministic for any number of threads. Nothing is mutated.
    """
    op = "bloom_weigh_backward"
    _check_rows(op, rows, row_bits)
    floats = {} if per_sample_weights is None else {"per_sample_weights": per_sample_weights}
    _check_held(op, "grad", grad, (max(0, offsets.numel() - 1), rows.shape[1]))
    with explained(op, ids, offsets, tables, grad=grad, **floats):
        return torch.ops.torchrec_cafe.bloom_weigh_backward.default(
            grad,
            rows,
            ids,
            offsets,
            tables,
            grad.new_empty(0) if per_sample_weights is None else per_sample_weights,
            row_bits.first_shard,
            row_bits.shards_held,
            weight_bits.per_shard,
            row_bits.num_hashes,
            weight_bits.num_hashes,
        )


@torch.library.register_fake("torchrec_cafe::bloom_pool")
def _(  # noqa: PLR0913  the schema has as many arguments
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    per_sample_weights: Tensor,
    first_shard: int,
    num_hashes: int,
    num_weight_hashes: int,
) -> Tensor:
    check_same_device("bloom_pool", rows=rows, weights=weights, ids=ids, tables=tables)
    features = tables.shape[0]
    batch_size = (offsets.shape[0] - 1) // features
    return weights.new_empty((batch_size, features * rows.shape[1]))


@torch.library.register_fake("torchrec_cafe::bloom_weigh")
def _(  # noqa: PLR0913  the schema has as many arguments
    weights: Tensor,
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    first_shard: int,
    num_hashes: int,
) -> Tensor:
    check_same_device("bloom_weigh", weights=weights, ids=ids, offsets=offsets, tables=tables)
    return weights.new_empty(ids.shape[0])


@torch.library.register_fake("torchrec_cafe::bloom_weigh_backward")
def _(  # noqa: PLR0913  the schema has as many arguments
    grad: Tensor,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    per_sample_weights: Tensor,
    first_shard: int,
    shards_held: int,
    weights_per_shard: int,
    num_hashes: int,
    num_weight_hashes: int,
) -> tuple[Tensor, Tensor]:
    check_same_device("bloom_weigh_backward", grad=grad, rows=rows, ids=ids, tables=tables)
    size = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(size), grad.new_empty((size, WEIGHTS_PER_ROW))
