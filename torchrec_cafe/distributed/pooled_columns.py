"""What the columns are that ranks with parts of a table add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_cafe.distributed._torchrec import GroupedEmbeddingConfig
from torchrec_cafe.distributed.types import GROUP_PARAM
from torchrec_cafe.tables import sample_vectors


class GroupColumns:
    """The columns of groups of tables, before and after the ranks' parts are added up.

    A group that gives a vector per sample has the ``D + 1`` columns of its token rows and factor;
    others have the columns of their features.

    Args:
        configs: the groups of a lookup, in order.
    """

    def __init__(self, configs: Sequence[GroupedEmbeddingConfig]) -> None:
        """Note the groups; see the class."""
        self._num_features = [config.num_features() for config in configs]
        self._is_per_sample = [_is_per_sample(config) for config in configs]
        self._widths = [
            config.embedding_dims()[0] + 1 if per_sample else config.dim_sum()
            for config, per_sample in zip(configs, self._is_per_sample, strict=True)
        ]

    @property
    def width(self) -> int:
        """Columns before the end."""
        return sum(self._widths)

    def finish(self, awaitable: Any) -> Any:
        """Have sums turned into the vectors of features when they are there.

        Args:
            awaitable: of the sums, mutated.
        """
        if any(self._is_per_sample):
            awaitable.callbacks.append(self._vectors)
        return awaitable

    def _vectors(self, summed: Tensor) -> Tensor:
        parts = list(summed.split(self._widths, 1))
        for number, (per_sample, num_features) in enumerate(
            zip(self._is_per_sample, self._num_features, strict=True)
        ):
            if per_sample:
                parts[number] = sample_vectors(parts[number], num_features)
        return torch.cat(parts, 1)


def _is_per_sample(config: GroupedEmbeddingConfig) -> bool:
    group = (config.fused_params or {}).get(GROUP_PARAM)
    return group is not None and group.is_per_sample
