"""Planning for a cluster that is only described."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardingType

from torchrec_cafe.config import Auto
from torchrec_cafe.distributed.constraints import ParameterConstraints
from torchrec_cafe.distributed.embedding_bag import EmbeddingBagCollectionSharder
from torchrec_cafe.distributed.plan_report import PlanReport
from torchrec_cafe.distributed.planner import EmbeddingShardingPlanner

#: What tables can be constrained to, in TorchRec's words.
SHARDING_TYPES = tuple(sharding_type.value for sharding_type in ShardingType)
COMPUTE_KERNELS = tuple(kernel.value for kernel in EmbeddingComputeKernel)
#: Names of the optimizers that tables can have.
OPTIMIZERS = MappingProxyType(
    {
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "adam": EmbOptimType.ADAM,
        "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    }
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster has.

    Attributes:
        world_size: ranks, >= 1.
        local_world_size: ranks of a host, a divisor of ``world_size``; ``None``: up to 8.
        compute_device: ``"cuda"`` or ``"cpu"``.
        hbm: bytes of a rank's device memory; ``None``: TorchRec's default.
        ddr: bytes of a rank's host memory; ``None``: TorchRec's default.
        reserve: share of memory kept for everything but tables, in [0, 1).
    """

    world_size: int
    local_world_size: int | None = None
    compute_device: str = "cuda"
    hbm: int | None = None
    ddr: int | None = None
    reserve: float = 0.15

    def _for_tables(self) -> int | None:
        """Host memory; TorchRec's reservations keep something of a GPU's memory only."""
        if self.ddr is None or self.compute_device != "cpu":
            return self.ddr
        return round(self.ddr * (1 - self.reserve))

    def topology(self) -> Topology:
        """The cluster in TorchRec's terms; without the host memory that is kept, on CPU."""
        local = self.local_world_size
        if local is None:
            most = min(8, self.world_size)
            local = next(n for n in range(most, 0, -1) if self.world_size % n == 0)
        return Topology(
            world_size=self.world_size,
            local_world_size=local,
            compute_device=self.compute_device,
            hbm_cap=self.hbm,
            ddr_cap=self._for_tables(),
        )


def plan_capacity(
    module: nn.Module,
    constraints: dict[str, ParameterConstraints],
    cluster: Cluster,
    *,
    batch_size: int,
    optimizer: str,
    auto: Auto | None,
) -> PlanReport:
    """Plan a model's tables without a process group.

    Args:
        module: the model, may be on the meta device.
        constraints: of its tables.
        cluster: where it would train.
        batch_size: samples of a rank's batch.
        optimizer: of :data:`OPTIMIZERS`.
        auto: what the planner may choose; ``None``: nothing.

    Raises:
        ValueError: as :class:`EmbeddingShardingPlanner`.
        BudgetError: if nothing fits.
        PlannerError: if TorchRec's planner finds no plan.
    """
    planner = EmbeddingShardingPlanner(
        topology=cluster.topology(),
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=cluster.reserve),
        auto=auto,
        stats=[],
        debug=False,
    )
    sharder: Any = EmbeddingBagCollectionSharder(fused_params={"optimizer": OPTIMIZERS[optimizer]})
    return planner.report_of(module, [sharder])
