"""A sharder as the planner should see it: tables with a kind at their size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import ModuleSharder

from torchrec_cafe.distributed.grouping import Groups
from torchrec_cafe.distributed.planned_bytes import PlannedTable


class PlanningSharder(ModuleSharder[nn.Module]):
    """The user's sharder as the planner should see it; it plans, and does not shard.

    Args:
        sharder: of this package.
        groups: of the tables that have a kind.
        planned: these tables.
    """

    def __init__(self, sharder: Any, groups: Groups, planned: Mapping[str, PlannedTable]) -> None:
        """Note the tables; see the class."""
        super().__init__(sharder.qcomm_codecs_registry)
        self._sharder = sharder
        self._groups = groups
        self._planned = planned

    @property
    def module_type(self) -> type[Any]:
        """Of the user's sharder."""
        return self._sharder.module_type

    @property
    def fused_params(self) -> dict[str, Any] | None:
        """Of the user's sharder."""
        return self._sharder.fused_params

    def shard(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Shard as the user's sharder."""
        return self._sharder.shard(module, *args, **kwargs)

    def shardable_parameters(self, module: Any) -> dict[str, nn.Parameter]:
        """Parameters of as many bytes as the tables take."""
        parameters = self._sharder.shardable_parameters(module)
        for name in self._groups.get(id(module), {}):
            old = parameters[name]
            rows = sum(self._planned[name].rows)
            weight = torch.empty((rows, old.shape[1]), dtype=old.dtype, device="meta")
            parameters[name] = nn.Parameter(weight)
        return parameters

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Those of the user's sharder, and those that tables with a kind have."""
        # On CPU TorchRec leaves row-wise sharding out, although gloo has every collective it needs.
        types = self._sharder.sharding_types(compute_device_type)
        needed = {group.sharding_type for of in self._groups.values() for group in of.values()}
        return types + sorted(needed - set(types))

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Those of the user's sharder."""
        return self._sharder.compute_kernels(sharding_type, compute_device_type)

    def storage_usage(
        self, tensor: torch.Tensor, compute_device_type: str, compute_kernel: str
    ) -> dict[str, int]:
        """That of the user's sharder."""
        return self._sharder.storage_usage(tensor, compute_device_type, compute_kernel)
