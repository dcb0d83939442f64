"""From the gradient of a batch's bags to what the sketch knows, in one operator.

Shape legend: N occurrences, F features, B samples, D columns, S virtual shards, T tables of a pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error
from torchrec_cafe.ops.hot_sketch import SketchState
from torchrec_cafe.ops.key_factors import WEIGHTS_PER_LINE, explain_factor_gradients
from torchrec_cafe.ops.pool_rows import Lookups
from torchrec_cafe.ops.row_map import Remapped


class ScaledRows(NamedTuple):
    """Rows that :func:`key_factors` scaled, and whose ids teach its weights.

    Attributes:
        table: float32 or float16 ``[R, D]``, physical rows.
        found: the rows of the bags, each in [0, R), and their ids, in [0, N).
        shards: int32 ``[N]``, shard of each id in [0, S), or -1: it teaches nothing.
        weights_per_shard: W of the weights, a multiple of 16.
        num_hashes: weights of a key, in [1, 16].
    """

    table: Tensor
    found: Lookups
    shards: Tensor
    weights_per_shard: int
    num_hashes: int


def learn(  # noqa: PLR0913  what a step of learning takes
    state: SketchState,
    norms: Tensor,
    grad: Tensor,
    offsets: Tensor,
    batch: Remapped,
    *,
    features: Tensor,
    weights: Tensor | None = None,
    decay: float = 1.0,
    growth: float = 1.0,
) -> None:
    r"""Add the importance of each occurrence of a batch to the sketch.

    The importance of an occurrence is the L2 norm of its bag's gradient, divided by the running
    mean of the norms of its table's bags, times the magnitude of its weight. What is not finite
    is left out of the mean, and counted and skipped as :func:`observe` does.

    Args:
        state: the sketch, mutated.
        norms: float64 ``[S, T, 2]``, running sum and count of each table's norms, the same in every
            shard; mutated.
        grad: float32 ``[B * F, D]``, gradient of the pooled bags, D a multiple of 4; bag
            ``b * F + f`` is sample b of feature f.
        offsets: int64 ``[F * B + 1]``, as :func:`remap` took them: bag ``f * B + b`` is sample b of
            feature f.
        batch: what :func:`remap` made of the batch; its ``keys`` and ``shards`` are used.
        features: int64 ``[F]``, table of each feature in [0, T), or -1: not tracked.
        weights: float32 ``[N]``, per-sample weight of each id as it came; ``None``: all one.
        decay: in [0, 1], what the running means keep of what they were.
        growth: see :func:`observe`.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, the devices differ, or ``offsets``
            does not ascend from 0 to N; nothing is mutated then. On CUDA the values of offsets,
            shards and features cannot be seen without waiting for the device: one out of range is
            not learned from.

    Note:
        Deterministic for any number of threads and on every device. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.2; normalised by table as in its released code.
    """
    _check_numbers("learn", decay, growth)
    try:
        torch.ops.torchrec_cafe.learn.default(
            grad,
            offsets,
            batch.keys,
            batch.shards,
            weights,
            features,
            norms,
            state.buckets,
            state.inflation,
            state.counters,
            decay,
            growth,
        )
    except RuntimeError as error:
        _explain("learn", state, norms, grad, offsets, batch, features, weights)
        raise value_error("learn", error) from None


def learn_scaled(  # noqa: PLR0913  what a step of learning takes
    state: SketchState,
    norms: Tensor,
    grad: Tensor,
    offsets: Tensor,
    batch: Remapped,
    scaled: ScaledRows,
    *,
    features: Tensor,
    weights: Tensor | None = None,
    decay: float = 1.0,
    growth: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`learn`, and the gradient of the weights that scaled the rows of the batch.

    On a CPU the gradient of the bags is read once for both.

    Args:
        state: see :func:`learn`, as all others but ``scaled``; mutated.
        norms: mutated.
        grad: float32 ``[B * F, D]``.
        offsets: int64 ``[F * B + 1]``.
        batch: its ``keys`` and ``shards`` are used.
        scaled: the rows that were looked up; bag ``b * F + f`` of ``found`` is sample b of feature
            f.
        features: int64 ``[F]``.
        weights: float32 ``[N]``, or ``None``.
        decay: in [0, 1].
        growth: see :func:`observe`.

    Returns:
        As :func:`factor_gradients`, with ``weights`` as ``given``.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: as :func:`learn` and :func:`factor_gradients` do; nothing is mutated then.

    Note:
        The same bits as of the two, one after the other. Not differentiable.

    Reference: CAFE (SIGMOD 2024), section 3.2; MEM-REC (ACML 2023), section 3.
    """
    _check_numbers("learn_scaled", decay, growth)
    table, found, taught, weights_per_shard, num_hashes = scaled
    try:
        return torch.ops.torchrec_cafe.learn_scaled.default(
            grad,
            offsets,
            batch.keys,
            batch.shards,
            weights,
            features,
            norms,
            state.buckets,
            state.inflation,
            state.counters,
            decay,
            growth,
            table,
            *found,
            taught,
            weights_per_shard,
            num_hashes,
        )
    except RuntimeError as error:
        op = "learn_scaled"
        _explain(op, state, norms, grad, offsets, batch, features, weights)
        explain_factor_gradients(op, grad, table, found, batch.keys, taught, features, weights)
        raise value_error(op, error) from None


def _check_numbers(op: str, decay: float, growth: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"{op}: `decay` must be in [0, 1], got {decay}")
    if not 1 <= growth <= 2**60:
        raise ValueError(f"{op}: `growth` must be in [1, 2**60], got {growth}")


def _explain(  # noqa: PLR0913  all that learn takes
    op: str,
    state: SketchState,
    norms: Tensor,
    grad: Tensor,
    offsets: Tensor,
    batch: Remapped,
    features: Tensor,
    weights: Tensor | None,
) -> None:
    """Name the argument that learn has refused."""
    size = tuple(batch.keys.shape)
    check_tensor(op, "grad", grad, torch.float32, (None, None))
    check_tensor(op, "batch.keys", batch.keys, torch.int64, (None,))
    check_tensor(op, "batch.shards", batch.shards, torch.int32, size)
    if weights is not None:
        check_tensor(op, "weights", weights, torch.float32, size)
    check_tensor(op, "features", features, torch.int64, (None,))
    check_tensor(op, "norms", norms, torch.float64, (len(state.inflation), None, 2))
    check_same_device(
        op,
        grad=grad,
        keys=batch.keys,
        offsets=offsets,
        shards=batch.shards,
        features=features,
        norms=norms,
        state=state.buckets,
    )
    if features.numel() == 0 or grad.shape[0] % features.numel():
        raise ValueError(
            f"{op}: `grad` must have a row for each sample and feature, got {grad.shape[0]} rows "
            f"for {features.numel()} features"
        )
    check_tensor(op, "offsets", offsets, torch.int64, (grad.shape[0] + 1,))
    if grad.shape[1] % 4:
        raise ValueError(
            f"{op}: `grad` must have a multiple of 4 columns, as FBGEMM's tables do, got "
            f"{grad.shape[1]}"
        )


@torch.library.register_fake("torchrec_cafe::learn")
def _(  # noqa: PLR0913  the schema has as many arguments
    grad: Tensor,
    offsets: Tensor,
    keys: Tensor,
    shards: Tensor,
    weights: Tensor | None,
    features: Tensor,
    norms: Tensor,
    buckets: Tensor,
    inflation: Tensor,
    counters: Tensor,
    decay: float,
    growth: float,
) -> None:
    check_same_device("learn", grad=grad, keys=keys, shards=shards, norms=norms, state=buckets)


@torch.library.register_fake("torchrec_cafe::learn_scaled")
def _(  # noqa: PLR0913  the schema has as many arguments
    grad: Tensor,
    offsets: Tensor,
    keys: Tensor,
    shards: Tensor,
    weights: Tensor | None,
    features: Tensor,
    norms: Tensor,
    buckets: Tensor,
    inflation: Tensor,
    counters: Tensor,
    decay: float,
    growth: float,
    table: Tensor,
    rows: Tensor,
    bag_offsets: Tensor,
    source: Tensor,
    taught: Tensor,
    weights_per_shard: int,
    num_hashes: int,
) -> tuple[Tensor, Tensor]:
    check_same_device(
        "learn_scaled", grad=grad, keys=keys, norms=norms, state=buckets, table=table, rows=rows
    )
    size = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(size), grad.new_empty((size, WEIGHTS_PER_LINE))
