"""Budget mode: the planner is handed memory, and chooses how each table is kept."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import POOLING_FACTOR
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_cafe.config import Auto, Lookahead, TableKind
from torchrec_cafe.config.text import human_bytes
from torchrec_cafe.distributed._torchrec import TorchRecConstraints, ranks_of_a_host
from torchrec_cafe.distributed.constraints import ParameterConstraints
from torchrec_cafe.distributed.embedding_bag import EmbeddingBagCollectionSharder
from torchrec_cafe.distributed.grouping import (
    check_table,
    collections_of,
    group_alone,
    own_sharder,
    ranks_of_a_table,
    table_shape,
)
from torchrec_cafe.distributed.option import BudgetError, TableOption, cheapest, options_that_fit
from torchrec_cafe.distributed.option_costs import Candidate, OptionCosts

logger = logging.getLogger(__name__)

_UVM = (
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
)
# A pool is for so many tables, if there are hosts for more pools: many tables divide its rows
# better, and many pools divide the work better. It may take this share of a host.
_TABLES_OF_A_POOL = 8
_SHARE_OF_A_HOST = 0.25


@dataclass(frozen=True)
class Choice:
    """What was chosen for the tables.

    Attributes:
        constraints: of each table that was chosen for, for the planner.
        options: what was chosen.
        why: for people.
    """

    constraints: dict[str, ParameterConstraints]
    options: dict[str, TableOption]
    why: dict[str, str]


class BudgetMode:
    """Chooses how tables are kept, so that they fit the memory that is left.

    Args:
        auto: what may be chosen.
        topology: of the plan.
        constraints: of the user, by table; not modified.
        batch_size: samples of a rank's batch.
    """

    def __init__(
        self,
        auto: Auto,
        topology: Topology,
        constraints: Mapping[str, TorchRecConstraints],
        batch_size: int,
    ) -> None:
        """Note what may be chosen; see the class."""
        self._auto = auto
        self._topology = topology
        self._constraints = constraints
        self._batch_size = batch_size
        self._tables: list[tuple[str, EmbeddingBagCollection, EmbeddingBagConfig]] = []
        self._options: list[list[TableOption]] = []

    def enumerate(self, module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]]) -> None:
        """Estimate every way of keeping every table that has no kind.

        Args:
            module: the model.
            sharders: must hold an :class:`EmbeddingBagCollectionSharder` of this package.
        """
        ours = own_sharder(sharders, "the planner has `auto`")
        tables = [
            (path, collection, config)
            for path, collection in collections_of(module, sharders)
            if isinstance(collection, EmbeddingBagCollection)  # others are TorchRec's, as ever
            for config in collection.embedding_bag_configs()
            if self._is_free(config.name)
        ]
        names = [config.name for *_, config in tables]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"tables {twice}: several collections have one of that name, and `auto` knows "
                "tables by name; rename them or leave auto out"
            )
        unknown = sorted(self._auto.stats.keys() - set(names))
        if unknown:
            logger.warning("auto.stats: no table to choose for is named %s", unknown)
        found = [(table, self._candidates(ours, *table)) for table in tables]
        # What constraints leave no choice for is TorchRec's, as they say.
        self._tables = [table for table, candidates in found if candidates]
        candidates = [candidates for _, candidates in found if candidates]
        asked = {name: self.constraint(config) for name, config in self._configs()}
        costs = OptionCosts(ours, self._topology, asked, self._batch_size, self._auto)
        self._options = costs.estimate(candidates)

    def _is_free(self, name: str) -> bool:
        given = self._constraints.get(name)
        if given is None:
            return True
        of_another_device = given.device_group not in (None, self._topology.compute_device)
        return getattr(given, "table", None) is None and not of_another_device

    @property
    def has_tables(self) -> bool:
        """Whether there is anything to choose."""
        return bool(self._tables)

    def _configs(self) -> Iterable[tuple[str, EmbeddingBagConfig]]:
        return ((config.name, config) for _, _, config in self._tables)

    def constraint(self, config: EmbeddingBagConfig) -> ParameterConstraints:
        """The user's constraints of a table, with the bag size of its statistics if they lack one.

        Args:
            config: of the table.
        """
        given = self._constraints.get(config.name)
        fields = {f.name for f in dataclasses.fields(ParameterConstraints)}
        values = {k: v for k, v in vars(given).items() if k in fields} if given else {}
        statistics = self._auto.stats.get(config.name)
        asked = values.get("pooling_factors") or [POOLING_FACTOR]
        if statistics is not None and set(asked) == {POOLING_FACTOR}:  # TorchRec's default
            values["pooling_factors"] = [statistics.bag_size] * len(config.feature_names)
        return ParameterConstraints(**values)

    def _candidates(
        self,
        sharder: EmbeddingBagCollectionSharder,
        path: str,
        collection: EmbeddingBagCollection,
        config: EmbeddingBagConfig,
    ) -> list[Candidate]:
        """Every way of keeping a table that its constraints allow."""
        device = self._topology.compute_device
        given = self.constraint(config)
        found = []
        for sharding_type in self._sharding_types(sharder.sharding_types(device), given):
            for kernel in sharder.compute_kernels(sharding_type, device):
                if given.compute_kernels and kernel not in given.compute_kernels:
                    continue
                if kernel == EmbeddingComputeKernel.FUSED.value or kernel in _UVM:
                    found += self._plain(path, collection, config, sharding_type, kernel)
        if given.compute_kernels:  # a kind would have its own
            return found
        return found + [
            Candidate(path, collection, config, kind, sharding_type, None, None)
            for kind in self._auto.kinds(table_shape(config))
            for sharding_type in self._sharding_types(self._types_of(kind), given)
            if self._can_be(sharder, collection, config, kind, sharding_type)
        ]

    def _can_be(
        self,
        sharder: EmbeddingBagCollectionSharder,
        collection: EmbeddingBagCollection,
        config: EmbeddingBagConfig,
        kind: TableKind,
        sharding_type: str,
    ) -> bool:
        """Whether a table can have a kind."""
        constraint = dataclasses.replace(
            self.constraint(config), table=kind, sharding_types=[sharding_type]
        )
        ranks = ranks_of_a_table(sharding_type, self._topology)
        device, fused_params = self._topology.compute_device, sharder.fused_params
        try:
            check_table(collection, config, constraint, device, fused_params)
            group = group_alone(kind, sharding_type, table_shape(config))
            if group.has_pool:
                group.shard_bounds(ranks)
        except ValueError:
            return False
        return not isinstance(kind, Lookahead) or self._holds_a_batch(config, kind, ranks)

    def _holds_a_batch(self, config: EmbeddingBagConfig, kind: Lookahead, ranks: int) -> bool:
        """Whether the slots of a rank hold the rows that its part of a batch needs at once."""
        rows = -(-config.num_embeddings // ranks)
        samples = self._batch_size * self._topology.world_size
        needed = samples * sum(self.constraint(config).pooling_factors or [1.0])
        statistics = self._auto.stats.get(config.name)
        if statistics is not None and statistics.lookahead_hits:
            distinct = statistics.lookahead_hits[0][0] * samples / statistics.batch_size
            needed = min(needed, distinct)
        return kind.slots_for(rows) >= min(rows, needed / ranks)

    def _plain(
        self,
        path: str,
        collection: EmbeddingBagCollection,
        config: EmbeddingBagConfig,
        sharding_type: str,
        kernel: str,
    ) -> list[Candidate]:
        fractions: Sequence[float | None] = (None,)
        if kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
            fractions = self._auto.cache_fractions
        return [
            Candidate(path, collection, config, None, sharding_type, kernel, fraction)
            for fraction in fractions
        ]

    def _spread(self) -> str:
        """How what is too much for a rank is spread: over a host, or over the only one."""
        if ranks_of_a_host(self._topology) < self._topology.world_size:
            return ShardingType.TABLE_ROW_WISE.value
        return ShardingType.ROW_WISE.value

    def _types_of(self, kind: TableKind) -> list[str]:
        # A pool is best spread; tables that share nothing may lie on one rank as well.
        whole = [ShardingType.TABLE_WISE.value] if isinstance(kind, Lookahead) else []
        return [*whole, self._spread()]

    def _sharding_types(self, possible: Sequence[str], given: ParameterConstraints) -> list[str]:
        useful = {
            ShardingType.TABLE_WISE.value,
            ShardingType.ROW_WISE.value,
            self._spread(),
        }
        allowed = given.sharding_types or possible
        return [t for t in possible if t in useful and t in allowed]

    def choose(
        self,
        device_bytes: int,
        host_bytes: int,
        of_a_rank: tuple[int, int],
        whole: tuple[int, int],
    ) -> Choice:
        """Choose an option for each table.

        Args:
            device_bytes: memory of all compute devices that tables may take.
            host_bytes: host memory that they may take.
            of_a_rank: memory of the compute device and of the host that a table may take of a
                rank, if it has an option that takes no more.
            whole: what a rank has.

        Raises:
            BudgetError: if nothing fits, saying what is missing.
        """
        error: BudgetError | None = None
        for unknown in (False, True):
            options = [
                options_that_fit(of_table, of_a_rank, whole, unknown=unknown)
                for of_table in self._options
            ]
            if not all(options):
                continue
            try:
                chosen = cheapest(options, device_bytes, host_bytes)
            except BudgetError as failed:
                error = failed
                continue
            of_tables = [of[i] for of, i in zip(options, chosen, strict=True)]
            return self._choice(of_tables, of_a_rank[0])
        raise self._refusal(error, device_bytes, host_bytes, whole)

    def _refusal(
        self,
        error: BudgetError | None,
        device_bytes: int,
        host_bytes: int,
        of_a_rank: tuple[int, int],
    ) -> BudgetError:
        kinds = [k.__name__ if isinstance(k, type) else repr(k) for k in self._auto.allow]
        advice = (
            f"more memory, a higher max_compression than {self._auto.max_compression:g}, or more "
            f"kinds than allow=({', '.join(kinds)})"
        )
        if error is None:
            name = next(
                config.name
                for (_, config), of_table in zip(self._configs(), self._options, strict=True)
                if not options_that_fit(of_table, of_a_rank, of_a_rank, unknown=True)
            )
            return BudgetError(
                f"table {name!r} fits no rank in any way that is allowed: each has "
                f"{human_bytes(of_a_rank[0])} for tables; it takes {advice}"
            )
        if device_bytes < 0 or host_bytes < 0:
            return BudgetError(
                "tables whose kind is given take more memory than there is: "
                f"{human_bytes(max(-device_bytes, 0))} of device memory and "
                f"{human_bytes(max(-host_bytes, 0))} of host memory are missing for them alone",
                max(-device_bytes, 0),
                max(-host_bytes, 0),
            )
        return BudgetError(
            f"no choice for the tables fits: besides {human_bytes(device_bytes)} of device "
            f"memory and {human_bytes(host_bytes)} of host memory that tables may take, "
            f"{human_bytes(error.device_missing)} and {human_bytes(error.host_missing)} are "
            f"missing; it takes {advice}",
            error.device_missing,
            error.host_missing,
        )

    def _choice(self, options: list[TableOption], device_of_a_rank: int) -> Choice:
        pools = self._pools(options, device_of_a_rank)
        constraints, chosen, why = {}, {}, {}
        for (name, config), option, pool, others in zip(
            self._configs(), options, pools, self._options, strict=True
        ):
            changes: dict[str, Any] = {"sharding_types": [option.sharding_type]}
            if option.kind is not None:
                changes["table"] = option.kind
                if pool is not None:
                    kind: Any = option.kind
                    changes["table"] = dataclasses.replace(kind, pool=pool)
            else:
                changes["compute_kernels"] = [option.compute_kernel]
                if option.load_factor is not None:
                    changes["cache_params"] = CacheParams(load_factor=option.load_factor)
            constraints[name] = dataclasses.replace(self.constraint(config), **changes)
            chosen[name], why[name] = option, _explain(option, others)
        return Choice(constraints, chosen, why)

    def _pools(self, options: Sequence[TableOption], device_of_a_rank: int) -> list[str | None]:
        """Names of pools, which spread the tables of a kind over the hosts."""
        of_a_host = device_of_a_rank * ranks_of_a_host(self._topology) * _SHARE_OF_A_HOST
        hosts = self._topology.world_size // ranks_of_a_host(self._topology)
        groups: dict[Any, list[int]] = {}
        for number, ((_, config), option) in enumerate(zip(self._configs(), options, strict=True)):
            if option.sharding_type == ShardingType.TABLE_ROW_WISE.value and hasattr(
                option.kind, "pool"
            ):
                key = (option.kind, config.embedding_dim, config.data_type, config.pooling)
                groups.setdefault(key, []).append(number)
        names: list[str | None] = [None] * len(options)
        for members in groups.values():
            total = sum(options[number].device_bytes for number in members)
            parts = min(hosts, -(-len(members) // _TABLES_OF_A_POOL))
            loads = [0] * max(parts, math.ceil(total / of_a_host))
            # The largest tables go first, each to the smallest pool.
            for number in sorted(members, key=lambda number: -options[number].device_bytes):
                pool = loads.index(min(loads))
                loads[pool] += options[number].device_bytes
                names[number] = str(pool)
        return names


def _explain(option: TableOption, others: Sequence[TableOption]) -> str:
    plain = min(
        (o for o in others if o.kind is None and o.compute_kernel not in _UVM),
        key=lambda o: o.cost,
        default=None,
    )
    if plain is None or option.kind is None and option.compute_kernel not in _UVM:
        return "fits as it is"
    saved = plain.device_bytes - option.device_bytes
    later = option.milliseconds - plain.milliseconds
    verb = "saves" if saved >= 0 else "fits a rank, takes"
    text = f"{verb} {human_bytes(abs(saved))} of device memory, {later:+.2g} ms a step"
    if option.risk is None:
        return f"{text}; nothing is known of its ids"
    if option.risk > 0:
        text += f"; {1 - option.risk:.0%} of the lookups own a row"
    return text
