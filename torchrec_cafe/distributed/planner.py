"""The sharding plan with tables that have a kind: TorchRec's planner, told what they cost."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.planner import EmbeddingShardingPlanner as TorchRecPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType, ShardingOption
from torchrec.distributed.types import (
    ModuleSharder,
    ShardingPlan,
    ShardingType,
)

from torchrec_cafe.config import Auto
from torchrec_cafe.distributed._torchrec import (
    Topology,
    TorchRecConstraints,
    reserved_topology,
    with_constraints,
)
from torchrec_cafe.distributed.budget_mode import BudgetMode, Choice
from torchrec_cafe.distributed.constraints import ParameterConstraints
from torchrec_cafe.distributed.estimators import (
    KindPerfConfig,
    KindStorageEstimator,
    planned_costs,
)
from torchrec_cafe.distributed.grouping import (
    Groups,
    collections_of,
    default_sharders,
    group_tables,
    ranks_of_a_table,
    sharder_of,
    table_shape,
)
from torchrec_cafe.distributed.optimizers import OptimizerState, optimizer_state
from torchrec_cafe.distributed.option import BudgetError
from torchrec_cafe.distributed.plan_entries import compress_entries
from torchrec_cafe.distributed.plan_report import PlanReport
from torchrec_cafe.distributed.planned_bytes import PlannedTable, plan_table
from torchrec_cafe.distributed.planning_sharder import PlanningSharder
from torchrec_cafe.distributed.report_rows import make_report
from torchrec_cafe.distributed.sharded_collection import OwnSharder
from torchrec_cafe.distributed.table_collections import configs_of, module_of, modules_of

logger = logging.getLogger(__name__)

# A choice that fits all memory together may not fit rank by rank; then less is used, in smaller
# shards, and again.
_ATTEMPTS = 12
_SHRINK = 0.94
_OF_STORAGE = (
    PlannerErrorType.INSUFFICIENT_STORAGE,
    PlannerErrorType.PARTITION,
    PlannerErrorType.STRICT_CONSTRAINTS,
)
_SHRINK_SHARDS = 0.75


class EmbeddingShardingPlanner(TorchRecPlanner):
    """Drop-in for TorchRec's planner that knows tables with a kind, and can choose kinds.

    Every argument keeps TorchRec's meaning; tables without ``table=`` are planned by TorchRec,
    unchanged, unless ``auto`` is given. Tables with a kind are estimated at the bytes that they
    take on each rank, optimizer state included. The caller's objects are not modified. An
    ``enumerator`` of one's own keeps its estimators: they see a fused table of as many bytes. It is
    copied, to be given the constraints that tables with a kind have.

    Args:
        args: TorchRec's arguments; ``constraints`` may hold :class:`ParameterConstraints`.
        auto: how tables without a kind may be kept; the planner chooses so that all fits the
            topology's memory, with the least estimated time and accuracy risk. ``None``: as plain
            tables.
        kwargs: TorchRec's arguments by name.

    Attributes:
        report: what the last plan of this process decides for each table; ``None`` before, and for
            plans without kinds. It is logged as well.

    Raises:
        ValueError: if a table with a kind is constrained to what it cannot do.
    """

    def __init__(self, *args: Any, auto: Auto | None = None, **kwargs: Any) -> None:
        """Check the constraints; see the class."""
        arguments = (
            inspect.signature(TorchRecPlanner.__init__).bind(self, *args, **kwargs).arguments
        )
        self._given: dict[str, TorchRecConstraints] = dict(arguments.get("constraints") or {})
        self._auto = auto
        for name, constraint in self._with_kind(self._given).items():
            constraint.check(name)
        # Enumerator and estimators keep a reference to this dictionary, which is ours.
        self._adapted: dict[str, Any] = dict(self._given)
        self._best: list[ShardingOption] = []
        self.report: PlanReport | None = None
        arguments = {name: value for name, value in arguments.items() if name != "self"}
        callbacks = [*(arguments.get("callbacks") or []), self._note]
        super().__init__(**(arguments | {"constraints": self._adapted, "callbacks": callbacks}))
        self._perf_config = KindPerfConfig({})
        self._storage_estimator = KindStorageEstimator(self._topology, self._adapted)
        if arguments.get("enumerator") is not None and self._knows_kinds:
            self._enumerator = with_constraints(self._enumerator, self._adapted)
        elif self._knows_kinds:
            perf = EmbeddingPerfEstimatorFactory.create_with_config(
                self._perf_config, topology=self._topology, constraints=self._adapted
            )
            self._enumerator = EmbeddingEnumerator(
                topology=self._topology,
                batch_size=self._batch_size,
                constraints=self._adapted,
                estimator=[perf, self._storage_estimator],
            )

    @property
    def _knows_kinds(self) -> bool:
        return self._auto is not None or bool(self._with_kind(self._given))

    @staticmethod
    def _with_kind(
        constraints: Mapping[str, TorchRecConstraints],
    ) -> dict[str, ParameterConstraints]:
        return {
            name: constraint
            for name, constraint in constraints.items()
            if isinstance(constraint, ParameterConstraints) and constraint.table is not None
        }

    def _note(self, best_plan: list[ShardingOption]) -> list[ShardingOption]:
        self._best = best_plan
        return best_plan

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Plan on one process; :meth:`collective_plan` broadcasts rank 0's plan.

        Args:
            module: the model.
            sharders: must hold the sharders of this package for the collections in which a table
                has a kind or may get one.

        Raises:
            ValueError: naming the table, if a table with a kind is unknown, has no sharder that
                can compress it, or has no row left.
            BudgetError: if ``auto`` finds nothing that fits; says what is missing.
            PlannerError: as TorchRec's.
        """
        self.report, self._best = None, []
        if not self._knows_kinds:
            return super().plan(module, sharders)
        if self._auto is None:
            return self._plan(module, sharders, None)
        return self._plan_in_budget(module, sharders, self._auto)

    def report_of(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> PlanReport:
        """Plan, and say what the plan decides, also if no table has a kind.

        Args:
            module: as for :meth:`plan`.
            sharders: as for :meth:`plan`.

        Raises:
            ValueError: as :meth:`plan`.
            PlannerError: as :meth:`plan`.
        """
        self.plan(module, sharders)
        if self.report is None:
            collections = collections_of(module, sharders)
            self.report = make_report(collections, self._best, {}, {}, self._reserved(), None)
        return self.report

    def _reserved(self) -> Topology:
        """The topology with the memory that is left for tables."""
        return reserved_topology(self._storage_reservation) or self._topology

    def _plan_in_budget(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]], auto: Auto
    ) -> ShardingPlan:
        taken_device, taken_host = self._taken(module, sharders)  # refuses what cannot be
        mode = BudgetMode(auto, self._topology, self._given, self._batch_size)
        mode.enumerate(module, sharders)
        if not mode.has_tables:
            return self._plan(module, sharders, None)
        left = self._storage_reservation.reserve(
            topology=self._topology,
            batch_size=self._batch_size,
            module=module,
            sharders=cast(Any, sharders),
            constraints=cast(Any, self._given),
        ).devices
        on_cpu = self._topology.compute_device == "cpu"
        device = [d.storage.ddr if on_cpu else d.storage.hbm for d in left]
        host = [0 if on_cpu else d.storage.ddr for d in left]
        whole = min(device), min(host)
        failure: PlannerError | None = None
        for attempt in range(_ATTEMPTS):
            share, shard = _SHRINK**attempt, _SHRINK_SHARDS**attempt
            budget = round(sum(device) * share) - taken_device
            on_hosts = round(sum(host) * share) - taken_host
            of_a_rank = round(whole[0] * shard), round(whole[1] * shard)
            try:
                choice = mode.choose(budget, on_hosts, of_a_rank, whole)
                return self._plan(module, sharders, choice)
            except BudgetError:
                if failure is None:
                    raise
                break  # of less memory than there is
            except PlannerError as error:
                if error.error_type not in _OF_STORAGE:
                    raise
                failure = error
                logger.info("a plan for %.0f %% of the memory fails: %s", 100 * share, error)
        assert failure is not None
        raise failure

    def _taken(
        self, module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]]
    ) -> tuple[int, int]:
        """Bytes of devices and hosts that tables take whose kind is given."""
        asked = self._with_kind(self._given)
        if not asked:
            return 0, 0
        groups = group_tables(module, sharders, asked, self._topology)
        planned = self._planned_tables(module, sharders, groups).values()
        return sum(sum(t.device) for t in planned), sum(sum(t.host) for t in planned)

    def _plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        choice: Choice | None,
    ) -> ShardingPlan:
        constraints = self._given | (choice.constraints if choice else {})
        kinds = self._with_kind(constraints)
        groups: Groups = {}
        if kinds:
            groups = group_tables(module, sharders, kinds, self._topology)
        planned = self._planned_tables(module, sharders, groups)
        self._storage_estimator.tables = planned
        self._storage_estimator.plain_states = (
            self._plain_states(module, sharders, planned) if self._auto else {}
        )
        self._perf_config.costs = planned_costs(planned, self._topology)
        self._adapted.clear()
        self._adapted |= constraints
        self._adapted |= {name: constraint.physical() for name, constraint in kinds.items()}
        self._keep_others_as_they_are(module, sharders, kinds)
        told: list[Any] = [
            PlanningSharder(sharder, groups, planned)
            if isinstance(sharder, OwnSharder)
            else sharder
            for sharder in sharders
        ]
        plan = super().plan(module, told)
        collections = collections_of(module, sharders)
        compress_entries(collections, plan, groups)
        self.report = make_report(
            collections, self._best, groups, planned, self._reserved(), choice
        )
        logger.info("how tables are kept:\n%s", self.report)
        return plan

    def _planned_tables(
        self, module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]], groups: Groups
    ) -> dict[str, PlannedTable]:
        planned: dict[str, PlannedTable] = {}
        for _, collection in collections_of(module, sharders):
            ours = sharder_of(sharders, collection)
            for config in configs_of(collection):
                group = groups.get(id(collection), {}).get(config.name)
                if group is None or ours is None:
                    continue
                table = module_of(collection, config.name)
                planned[config.name] = plan_table(
                    group,
                    config.name,
                    ranks_of_a_table(group.sharding_type, self._topology),
                    row_bytes=table_shape(config).row_bytes,
                    state=optimizer_state(table, ours.fused_params, config.embedding_dim),
                    on_cpu=self._topology.compute_device == "cpu",
                )
        return planned

    def _plain_states(
        self,
        module: nn.Module,
        sharders: Sequence[ModuleSharder[nn.Module]],
        planned: Mapping[str, PlannedTable],
    ) -> dict[str, OptimizerState]:
        """What optimizers keep for plain tables: a budget has to count it."""
        return {
            name: optimizer_state(table, ours.fused_params, table.embedding_dim)
            for _, collection in collections_of(module, sharders)
            if (ours := sharder_of(sharders, collection)) is not None
            for name, table in modules_of(collection).items()
            if name not in planned
        }

    def _keep_others_as_they_are(
        self,
        module: nn.Module,
        sharders: Sequence[ModuleSharder[nn.Module]],
        kinds: Mapping[str, ParameterConstraints],
    ) -> None:
        """What the planning sharder offers besides TorchRec's is for tables with a kind only."""
        for _, collection in collections_of(module, sharders):
            ours = sharder_of(sharders, collection)
            if ours is None:
                continue
            types = ours.sharding_types(self._topology.compute_device)
            types = [t for t in types if t != ShardingType.GRID_SHARD.value]
            for config in configs_of(collection):
                constraint = self._adapted.get(config.name, TorchRecConstraints())
                if config.name not in kinds and not constraint.sharding_types:
                    self._adapted[config.name] = dataclasses.replace(
                        constraint, sharding_types=types
                    )

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Plan on rank 0 and broadcast; as TorchRec's, with our sharder as the default.

        A refusal is raised on every rank; all ranks have the :attr:`report`.

        Args:
            module: the model.
            sharders: as in :meth:`plan`.
            pg: process group of the plan.
        """
        if not self._knows_kinds:
            return super().collective_plan(module, sharders, pg)
        if sharders is None:
            sharders = default_sharders()
        group = pg or dist.group.WORLD
        assert group is not None, "init_process_group() must be called before collective_plan()"
        outcome = invoke_on_rank_and_broadcast_result(group, 0, self._attempt, module, sharders)
        if isinstance(outcome, Exception):
            # The other ranks would wait for rank 0's plan forever.
            raise outcome
        plan, self.report = outcome
        return plan

    def _attempt(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> tuple[ShardingPlan, PlanReport | None] | Exception:
        try:
            return self.plan(module, sharders), self.report
        except Exception as error:  # noqa: BLE001  raised on every rank
            return error
