"""Bags of several tables as bags of one.

Shape legend: N occurrences, F features, B samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error


class PooledKeys(NamedTuple):
    """Bags of several tables as bags of one.

    Attributes:
        keys: int64 ``[K]``, rows, sample-major; K = N, less the ids of tables without rows.
        offsets: int64 ``[B * F + 1]``, bag ``b * F + f`` is feature f of sample b.
        source: int32 ``[K]``, position of each occurrence in the batch's ids.
    """

    keys: Tensor
    offsets: Tensor
    source: Tensor


def pool_keys(ids: Tensor, offsets: Tensor, ranges: Tensor, out_of_range: Tensor) -> PooledKeys:
    """Take rows of several tables as rows of one, in which the tables lie one after the other.

    Args:
        ids: int64 ``[N]``, feature-major.
        offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
        ranges: int64 ``[F, 2]``, of each feature's table the first row, and how many it has.
        out_of_range: int64 ``[F]``, mutated: how many ids were not in their table is added. They
            are taken as id 0, as FBGEMM does, or left out if the table has no row.

    Returns:
        The bags, sample by sample.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or offsets do not ascend; nothing is mutated
            then.

    Note:
        Deterministic. On the CPU. Not differentiable.
    """
    try:
        return PooledKeys._make(
            torch.ops.torchrec_cafe.pool_keys.default(ids, offsets, ranges, out_of_range)
        )
    except RuntimeError as error:
        check_tensor("pool_keys", "ids", ids, torch.int64, (None,))
        check_tensor("pool_keys", "offsets", offsets, torch.int64, (None,))
        check_tensor("pool_keys", "ranges", ranges, torch.int64, (None, 2))
        check_tensor("pool_keys", "out_of_range", out_of_range, torch.int64, (len(ranges),))
        features = len(ranges)
        if features == 0 or offsets.numel() == 0 or (offsets.numel() - 1) % features:
            raise ValueError(
                f"pool_keys: `offsets` must have features * batch + 1 elements, got "
                f"{offsets.numel()} for {len(ranges)} features"
            ) from None
        raise value_error("pool_keys", error) from None


@torch.library.register_fake("torchrec_cafe::pool_keys")
def _(
    ids: Tensor, offsets: Tensor, ranges: Tensor, out_of_range: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device("pool_keys", ids=ids, offsets=offsets, ranges=ranges)
    kept = torch.library.get_ctx().new_dynamic_size()
    source = ids.new_empty(kept, dtype=torch.int32)
    return ids.new_empty(kept), torch.empty_like(offsets), source
