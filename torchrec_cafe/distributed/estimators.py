"""What the planner estimates of tables with a kind: bytes of their groups, time of lookups."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.estimator import (
    EmbeddingPerfEstimatorConfig,
    EmbeddingPerfEstimatorFactory,
    ShardPerfContext,
    backward_compute,
    forward_compute,
)
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    ShardEstimator,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.types import ShardingType

from torchrec_cafe.distributed._torchrec import default_backward_compute, default_forward_compute
from torchrec_cafe.distributed.lookup_cost import LookupCost
from torchrec_cafe.distributed.optimizers import OptimizerState
from torchrec_cafe.distributed.planned_bytes import PlannedTable

#: Name of :class:`KindPerfConfig` in TorchRec's registry of hardware configurations.
PERF_CONFIG = "torchrec_cafe"


class KindPerfConfig(EmbeddingPerfEstimatorConfig):
    """TorchRec's default estimates, with the lookups of tables that have a kind.

    A table costs what TorchRec estimates for a fused table, times what its kind adds to a lookup.
    Tables without a kind are estimated as TorchRec does. ``customized_kernel`` has the bandwidth of
    a fused kernel.

    Attributes:
        costs: by table, what its lookups cost.
    """

    name = PERF_CONFIG

    def __init__(self, costs: Mapping[str, LookupCost] | None = None) -> None:
        """Note the kinds.

        Args:
            costs: kept by reference: the planner fills it in while it plans.
        """
        self.costs: Mapping[str, LookupCost] = {} if costs is None else costs

    def __dir__(self) -> list[str]:
        """The methods that TorchRec has to find: it looks through all names for each estimate."""
        return _annotated(type(self))

    @forward_compute
    def lookup_forward(self, ctx: ShardPerfContext) -> float:
        """Milliseconds of a shard's lookups."""
        default = default_forward_compute(ctx, self)
        cost = self.costs.get(ctx.table_name)
        return default if cost is None else default * cost.factor(ctx.batch_inputs)

    @backward_compute
    def lookup_backward(self, ctx: ShardPerfContext) -> float:
        """Milliseconds of a shard's gradients and updates."""
        default = default_backward_compute(ctx, self)
        cost = self.costs.get(ctx.table_name)
        return default if cost is None else default * cost.factor(ctx.batch_inputs)

    def get_device_bw(self, compute_device: str, compute_kernel: str, *args: Any, **kw: Any) -> Any:
        """As TorchRec's; our own kernel is as fast as a fused one."""
        if compute_kernel == EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value:
            compute_kernel = EmbeddingComputeKernel.FUSED.value
        return super().get_device_bw(compute_device, compute_kernel, *args, **kw)


EmbeddingPerfEstimatorFactory.register(PERF_CONFIG)(KindPerfConfig)


@functools.cache
def _annotated(config: type[KindPerfConfig]) -> list[str]:
    """Names of the methods of a configuration that carry an annotation of TorchRec's."""
    return [
        name
        for name in dir(config)
        if any(key.startswith("_is_") for key in getattr(getattr(config, name), "__dict__", ()))
    ]


class KindStorageEstimator(ShardEstimator):
    """TorchRec's estimates of storage, with the bytes of tables that have a kind.

    Tables without a kind are estimated as TorchRec does. The others are what TorchRec estimates for
    a fused table of as many bytes as they take on each rank, and what they keep in host memory
    besides.

    Args:
        topology: of the plan.
        constraints: of the tables.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> None:
        """Start without tables; see the class."""
        self._torchrec = EmbeddingStorageEstimator(topology=topology, constraints=constraints)
        self._compute_device = topology.compute_device
        #: By name, the tables that have a kind; the planner fills it in while it plans.
        self.tables: dict[str, PlannedTable] = {}
        #: By name, what the optimizer keeps for a row of plain tables, if that is to be counted:
        #: TorchRec does not know of optimizers among the fused parameters.
        self.plain_states: dict[str, OptimizerState] = {}

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Estimate the storage of each shard.

        Args:
            sharding_options: mutated: storage of the shards, and sizes of those of our tables.
            args: as TorchRec's.
            kwargs: as TorchRec's.
        """
        ours = [option for option in sharding_options if option.name in self.tables]
        for option in ours:
            _set_rows(option, self.tables[option.name])
        self._torchrec.estimate(sharding_options, *args, **kwargs)
        for option in ours:
            for shard, host in zip(option.shards, self.tables[option.name].host, strict=False):
                assert shard.storage is not None
                shard.storage += Storage(hbm=0, ddr=host)
        for option in sharding_options:
            state = self.plain_states.get(option.name)
            if state is not None and option.name not in self.tables:
                _add_state(option, state, on_device=self._on_device(option))
        _gather_pools(ours, self.tables)

    def _on_device(self, option: ShardingOption) -> bool:
        """Whether optimizer state lies in the memory of a GPU: where the weights are."""
        return self._compute_device != "cpu" and "uvm" not in option.compute_kernel


def _set_rows(option: ShardingOption, table: PlannedTable) -> None:
    """Cut a table as its bytes are divided between the ranks."""
    if option.sharding_type == ShardingType.DATA_PARALLEL.value:
        return
    first = 0
    for shard, rows in zip(option.shards, table.rows, strict=False):
        dim = shard.size[1]
        shard.size, shard.offset = [rows, dim], [first, 0]
        first += rows


def _add_state(option: ShardingOption, state: OptimizerState, *, on_device: bool) -> None:
    if hasattr(option.tensor, "_optimizer_classes"):  # TorchRec has counted it
        return
    if option.sharding_type == ShardingType.DATA_PARALLEL.value:  # the dense optimizer's
        return
    for shard in option.shards:
        rows, dim = shard.size
        count = rows * state.of_row(dim)
        assert shard.storage is not None
        shard.storage += Storage(hbm=count if on_device else 0, ddr=0 if on_device else count)


def _gather_pools(options: Sequence[ShardingOption], tables: Mapping[str, PlannedTable]) -> None:
    """Count what tables that follow the first of their pool take and last at the first.

    TorchRec's partitioner places each table by itself; where the first goes, all go.
    """
    firsts = {option.name: option for option in options}
    for option in options:
        group = tables[option.name].group
        first = firsts.get(group.tables[0].name)
        if not group.stays_together or first is None or first is option:
            continue
        for mine, of_first in zip(option.shards, first.shards, strict=True):
            assert mine.storage is not None
            assert of_first.storage is not None
            of_first.storage += mine.storage
            mine.storage = Storage(hbm=0, ddr=0)
            if mine.perf is not None and of_first.perf is not None:
                of_first.perf += mine.perf
                mine.perf = Perf(fwd_compute=0, fwd_comms=0, bwd_compute=0, bwd_comms=0)


def planned_costs(tables: Mapping[str, PlannedTable], topology: Topology) -> dict[str, LookupCost]:
    """What lookups cost, by table.

    Args:
        tables: by name.
        topology: of the plan.
    """
    return {
        name: LookupCost.of(
            table.group.kind,
            on_cpu=topology.compute_device == "cpu",
            slots=max(table.slots),
            batches=topology.world_size / len(table.slots),
        )
        for name, table in tables.items()
    }
