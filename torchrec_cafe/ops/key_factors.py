"""Learned factors of the ids that a pool tracks, from weights as MEM-REC has them.

Shape legend: N ids, M rows, F features, B samples, S virtual shards of a rank, W weights a shard,
D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error
from torchrec_cafe.ops.pool_rows import Lookups

#: weights that lie in a line, which is a row of FBGEMM and a cache line; all of an id's are in one
WEIGHTS_PER_LINE = 16


def key_factors(
    weights: Tensor,
    keys: Tensor,
    shards: Tensor,
    source: Tensor | None = None,
    *,
    num_hashes: int,
) -> Tensor:
    """Add up the weights of each key: all in one line, one in each of ``num_hashes`` parts of it.

    A split block Bloom filter, with weights for bits.

    Args:
        weights: float32 ``[S, W]``, W a multiple of 16.
        keys: int64 ``[N]``, as :func:`remap` gives them.
        shards: int32 ``[N]``, the key's shard of this rank, in [0, S), or -1: it has no weights.
        source: int32 ``[M]``, the key of each row, in [0, N); ``None``: each key once, as they
            come.
        num_hashes: weights of a key, in [1, 16]; ``N < 2**31``.

    Returns:
        float32 ``[M]``, without ``source`` ``[N]``; 1 where the shard is -1.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, or the devices differ. On CUDA a
            shard out of range counts as -1, and a source as that of a key without weights.

    Note:
        Deterministic, and the same on every device. Nothing is mutated. Not differentiable by
        autograd: see :func:`factor_gradients`.

    Reference: MEM-REC (ACML 2023), section 3: the weight encoder, there with weights anywhere.
        Split block: F. Putze et al., Cache-, hash- and space-efficient Bloom filters (WEA 2007).
    """
    op = "key_factors"
    try:
        return torch.ops.torchrec_cafe.key_factors.default(
            weights, keys, shards, num_hashes, source
        )
    except RuntimeError as error:
        check_tensor(op, "weights", weights, torch.float32, (None, None))
        others = {} if source is None else {"source": source}
        _check_keys(op, keys, shards, weights=weights, **others)
        if source is not None:
            check_tensor(op, "source", source, torch.int32, (None,))
        raise value_error(op, error) from None


def factor_gradients(  # noqa: PLR0913  what the backward pass of scaled rows takes
    grad: Tensor,
    table: Tensor,
    found: Lookups,
    keys: Tensor,
    shards: Tensor,
    *,
    features: Tensor,
    given: Tensor | None = None,
    shape: tuple[int, int],
    num_hashes: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of the weights of :func:`key_factors`, by lines.

    That of the factor of a row is the scalar product of the row and the gradient of its bag.

    Args:
        grad: float32 ``[B * F, D]``, of the pooled bags; bag ``b * F + f`` is sample b of feature
            f.
        table: float32 or float16 ``[R, D]``, physical rows.
        found: the rows of the bags, each in [0, R), and their ids, in [0, N).
        keys: int64 ``[N]``, as :func:`key_factors` takes them.
        shards: int32 ``[N]``, as :func:`key_factors` takes them: ids whose shard is below 0 teach
            nothing.
        features: int64 ``[F]``, as :func:`learn` takes them: no id of a feature below 0 has a
            shard, and its bags are passed over.
        given: float32 ``[N]``, by what the rows of each id are scaled besides; ``None``: all one.
        shape: S and W of the weights.
        num_hashes: as :func:`key_factors` takes it.

    Returns:
        int64 ``[U]``, rows of the weights viewed as ``[S * W / 16, 16]``; float32 ``[U, 16]``,
        their gradients. On a CPU the rows that the keys hit, each once, in an order that depends on
        the arguments alone. On CUDA ``U = M`` and rows repeat: their gradients are to be added up,
        as FBGEMM does; what teaches nothing gives row ``S * W / 16``, one past the last, with
        gradient 0.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, or the devices differ. On CUDA
            rows, ids and shards out of range teach nothing.

    Note:
        Deterministic for any number of threads. Nothing is mutated.
    """
    op = "factor_gradients"
    try:
        return torch.ops.torchrec_cafe.factor_gradients.default(
            *(grad, table, *found, keys, shards, given, features, *shape, num_hashes)
        )
    except RuntimeError as error:
        explain_factor_gradients(op, grad, table, found, keys, shards, features, given)
        raise value_error(op, error) from None


def explain_factor_gradients(  # noqa: PLR0913  what the operator takes
    op: str,
    grad: Tensor,
    table: Tensor,
    found: Lookups,
    keys: Tensor,
    shards: Tensor,
    features: Tensor,
    given: Tensor | None,
) -> None:
    """Name the argument of :func:`factor_gradients` that an operator has refused.

    Args:
        op: the operator.
        grad: as given; so are the others.
        table: as given.
        found: as given.
        keys: as given.
        shards: as given.
        features: as given.
        given: as given.

    Raises:
        TypeError: if it is a dtype.
        ValueError: if it is a shape or a device; nothing is raised if it is a value.
    """
    if table.dtype not in (torch.float32, torch.float16):
        raise TypeError(f"{op}: `table` must be torch.float32 or torch.float16, got {table.dtype}")
    check_tensor(op, "table", table, table.dtype, (None, None))
    check_tensor(op, "rows", found.rows, torch.int64, (None,))
    check_tensor(op, "offsets", found.offsets, torch.int64, (None,))
    check_tensor(op, "source", found.source, torch.int32, (found.rows.numel(),))
    of_bags = (found.offsets.numel() - 1, table.shape[1])
    check_tensor(op, "grad", grad, torch.float32, of_bags)
    check_tensor(op, "features", features, torch.int64, (None,))
    tensors = {"rows": found.rows, "source": found.source, "features": features}
    if given is not None:
        check_tensor(op, "given", given, torch.float32, tuple(keys.shape))
        tensors["given"] = given
    _check_keys(op, keys, shards, grad=grad, table=table, **tensors)


def _check_keys(op: str, keys: Tensor, shards: Tensor, **others: Tensor) -> None:
    check_tensor(op, "keys", keys, torch.int64, (None,))
    check_tensor(op, "shards", shards, torch.int32, tuple(keys.shape))
    check_same_device(op, keys=keys, shards=shards, **others)


@torch.library.register_fake("torchrec_cafe::key_factors")
def _(
    weights: Tensor, keys: Tensor, shards: Tensor, num_hashes: int, source: Tensor | None = None
) -> Tensor:
    check_same_device("key_factors", weights=weights, keys=keys, shards=shards)
    return weights.new_empty((keys if source is None else source).shape[0])


@torch.library.register_fake("torchrec_cafe::factor_gradients")
def _(  # noqa: PLR0913  the schema has as many arguments
    grad: Tensor,
    table: Tensor,
    rows: Tensor,
    offsets: Tensor,
    source: Tensor,
    keys: Tensor,
    shards: Tensor,
    given: Tensor | None,
    features: Tensor,
    shards_held: int,
    weights_per_shard: int,
    num_hashes: int,
) -> tuple[Tensor, Tensor]:
    check_same_device(
        "factor_gradients", grad=grad, table=table, rows=rows, source=source, keys=keys
    )
    size = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(size), grad.new_empty((size, WEIGHTS_PER_LINE))
