"""What ways of keeping tables would cost, by the planner's own estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.types import Shard, ShardingOption, Topology
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_cafe.config import Auto, TableKind
from torchrec_cafe.distributed._torchrec import estimate_options, partition_by
from torchrec_cafe.distributed.constraints import ParameterConstraints
from torchrec_cafe.distributed.embedding_bag import EmbeddingBagCollectionSharder
from torchrec_cafe.distributed.estimators import (
    KindPerfConfig,
    KindStorageEstimator,
    planned_costs,
)
from torchrec_cafe.distributed.grouping import group_alone, ranks_of_a_table, table_shape
from torchrec_cafe.distributed.optimizers import optimizer_state
from torchrec_cafe.distributed.option import TableOption
from torchrec_cafe.distributed.planned_bytes import PlannedTable, plan_table
from torchrec_cafe.distributed.types import physical_kernel


class Candidate(NamedTuple):
    """A way of keeping a table, not yet estimated; as :class:`TableOption`."""

    path: str
    collection: EmbeddingBagCollection
    config: EmbeddingBagConfig
    kind: TableKind | None
    sharding_type: str
    compute_kernel: str | None
    load_factor: float | None


class OptionCosts:
    """Estimates candidates by one shard each: all shards of a table are alike.

    Args:
        sharder: that will shard.
        topology: of the plan.
        constraints: by table.
        batch_size: samples of a rank's batch.
        auto: the price of risk.
    """

    def __init__(
        self,
        sharder: EmbeddingBagCollectionSharder,
        topology: Topology,
        constraints: dict[str, ParameterConstraints],
        batch_size: int,
        auto: Auto,
    ) -> None:
        """Make the estimators; see the class."""
        self._sharder = sharder
        self._topology = topology
        self._constraints: dict[str, Any] = dict(constraints)
        self._batch_size = batch_size
        self._auto = auto
        self._config = KindPerfConfig({})
        self._storage = KindStorageEstimator(topology, self._constraints)
        self._perf = EmbeddingPerfEstimatorFactory.create_with_config(
            self._config, topology=topology, constraints=self._constraints
        )

    def estimate(self, candidates: Sequence[Sequence[Candidate]]) -> list[list[TableOption]]:
        """Estimate the candidates of all tables.

        Args:
            candidates: of each table.
        """
        result: list[list[TableOption]] = [[] for _ in candidates]
        # One candidate of each table at a time: the estimators know tables by their names.
        for number, of_tables in enumerate(zip_longest(*candidates)):
            ours = [(row, c) for row, c in enumerate(of_tables) if c is not None]
            for (row, candidate), option in zip(
                ours, self._estimated([c for _, c in ours]), strict=True
            ):
                assert len(result[row]) == number
                result[row].append(self._priced(candidate, option, result[row]))
        return result

    def _estimated(self, candidates: Sequence[Candidate]) -> list[ShardingOption]:
        tables = {c.config.name: self._planned(c) for c in candidates if c.kind is not None}
        self._storage.tables = tables
        self._storage.plain_states = {
            c.config.name: optimizer_state(
                c.collection.embedding_bags[c.config.name],
                self._sharder.fused_params,
                c.config.embedding_dim,
            )
            for c in candidates
            if c.kind is None
        }
        self._config.costs = planned_costs(tables, self._topology)
        options = [self._option(c, tables.get(c.config.name)) for c in candidates]
        estimate_options(self._perf, options, self._sharder)
        estimate_options(self._storage, options, self._sharder)
        return options

    def _planned(self, candidate: Candidate) -> PlannedTable:
        config, kind = candidate.config, candidate.kind
        assert kind is not None
        shape = table_shape(config)
        bag: nn.Module = candidate.collection.embedding_bags[config.name]
        return plan_table(
            group_alone(kind, candidate.sharding_type, shape),
            config.name,
            ranks_of_a_table(candidate.sharding_type, self._topology),
            row_bytes=shape.row_bytes,
            state=optimizer_state(bag, self._sharder.fused_params, config.embedding_dim),
            on_cpu=self._topology.compute_device == "cpu",
        )

    def _option(self, candidate: Candidate, planned: PlannedTable | None) -> ShardingOption:
        config = candidate.config
        weight: Any = candidate.collection.embedding_bags[config.name].weight
        ranks = ranks_of_a_table(candidate.sharding_type, self._topology)
        rows = -(-config.num_embeddings // ranks)
        if planned is not None:
            rows = max(planned.rows)
            weight = torch.empty(
                (sum(planned.rows), config.embedding_dim), dtype=weight.dtype, device="meta"
            )
        constraint = self._constraints[config.name]
        caching = candidate.load_factor is not None
        return ShardingOption(
            name=config.name,
            tensor=weight,
            module=(candidate.path, candidate.collection),
            input_lengths=constraint.pooling_factors or [1.0] * len(config.feature_names),
            batch_size=self._batch_size,
            sharding_type=candidate.sharding_type,
            partition_by=partition_by(candidate.sharding_type),
            compute_kernel=candidate.compute_kernel or physical_kernel(candidate.sharding_type),
            shards=[Shard(size=[rows, config.embedding_dim], offset=[0, 0])],
            cache_params=CacheParams(load_factor=candidate.load_factor) if caching else None,
            is_pooled=True,
            feature_names=config.feature_names,
        )

    def _priced(
        self, candidate: Candidate, option: ShardingOption, before: Sequence[TableOption]
    ) -> TableOption:
        ranks = ranks_of_a_table(candidate.sharding_type, self._topology)
        (shard,) = option.shards
        assert shard.storage is not None
        assert shard.perf is not None
        on_cpu = self._topology.compute_device == "cpu"
        device = shard.storage.ddr if on_cpu else shard.storage.hbm
        milliseconds = shard.perf.total * ranks / self._topology.world_size
        plain = min((o.milliseconds for o in before if o.kind is None), default=milliseconds)
        # TorchRec estimates sharding types by formulas of their own: no kind is to be chosen
        # because it can be sharded in a way that plain tables cannot.
        time = milliseconds
        if candidate.kind is not None:
            lookups = sum(option.input_lengths) * self._batch_size
            times = self._config.costs[option.name].factor(lookups)
            time = max(milliseconds, plain * max(1.0001, times))
        risk = priced = self._auto.risk(candidate.kind, table_shape(candidate.config))
        if priced is None:  # as if no lookup owned a row, and worse the more are shared
            priced = 1.0 + math.log10(getattr(candidate.kind, "compression", 1.0))
        return TableOption(
            kind=candidate.kind,
            sharding_type=candidate.sharding_type,
            compute_kernel=candidate.compute_kernel,
            load_factor=candidate.load_factor,
            device_bytes=device * ranks,
            host_bytes=0 if on_cpu else shard.storage.ddr * ranks,
            largest_shard=device,
            largest_on_host=0 if on_cpu else shard.storage.ddr,
            milliseconds=milliseconds,
            risk=risk,
            cost=time + self._auto.risk_weight * plain * priced,
        )
