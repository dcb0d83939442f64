"""One way of keeping a table, and what it would cost; the choice among many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrec_cafe.config import TableKind


@dataclass(frozen=True, kw_only=True)
class TableOption:
    """A way of keeping a table.

    Attributes:
        kind: how it is kept; ``None``: a plain table.
        sharding_type: how it is sharded.
        compute_kernel: of a plain table.
        load_factor: of a plain table whose rows are cached by FBGEMM.
        device_bytes: memory of compute devices that it takes, over all ranks.
        host_bytes: host memory besides, over all ranks.
        largest_shard: most bytes of a device that a rank needs.
        largest_on_host: most bytes of host memory that a rank needs besides.
        milliseconds: of a step, estimated, averaged over the ranks.
        risk: share of its lookups whose rows other ids share; ``None``: unknown.
        cost: time and risk together, in milliseconds.
    """

    kind: TableKind | None
    sharding_type: str
    compute_kernel: str | None
    load_factor: float | None
    device_bytes: int
    host_bytes: int
    largest_shard: int
    largest_on_host: int
    milliseconds: float
    risk: float | None
    cost: float


class BudgetError(ValueError):
    """No choice fits the memory.

    Attributes:
        device_missing: bytes of compute devices that are missing at least.
        host_missing: bytes of host memory that are missing then.
    """

    def __init__(self, message: str, device_missing: int = 0, host_missing: int = 0) -> None:
        """See the class."""
        super().__init__(message)
        self.device_missing = device_missing
        self.host_missing = host_missing


def options_that_fit(
    options: Sequence[TableOption],
    of_a_rank: tuple[int, int],
    whole: tuple[int, int],
    *,
    unknown: bool,
) -> list[TableOption]:
    """The options of a table that fit a rank; if it has none, those with the smallest shards.

    Args:
        options: of the table.
        of_a_rank: bytes of the device and of the host that a table may take of a rank.
        whole: what a rank has; nothing takes more.
        unknown: whether options of unknown risk are among them.
    """
    known = [o for o in options if unknown or o.risk is not None]
    fits = [o for o in known if _fits(o, of_a_rank)]
    if fits:
        return fits
    largest = min((o.largest_shard for o in known if _fits(o, whole)), default=0)
    return [o for o in known if _fits(o, whole) and o.largest_shard <= largest]


def _fits(option: TableOption, of_a_rank: tuple[int, int]) -> bool:
    return option.largest_shard <= of_a_rank[0] and option.largest_on_host <= of_a_rank[1]


def cheapest(
    options: Sequence[Sequence[TableOption]], device_limit: int, host_limit: int
) -> list[int]:
    """Choose an option for each table: little cost within the memory.

    A greedy choice, as for multiple-choice knapsacks: every table begins with its cheapest option;
    while memory is exceeded, the change that costs least per byte saved is made; then changes that
    save cost are made while there is room. Deterministic.

    Args:
        options: of each table, at least one.
        device_limit: bytes of all compute devices.
        host_limit: bytes of all host memory.

    Returns:
        Index of the option of each table.

    Raises:
        BudgetError: if nothing was found that fits.
    """
    search = _Search(options, device_limit, host_limit)
    search.shrink()
    search.improve()
    return search.chosen.tolist()


class _Search:
    """The state of the search: what is chosen, and what changes would bring."""

    def __init__(
        self, options: Sequence[Sequence[TableOption]], device_limit: int, host_limit: int
    ) -> None:
        width = max(len(of_table) for of_table in options)
        shape = (len(options), width)
        self._cost: NDArray[np.float64] = np.full(shape, np.inf)
        self._device: NDArray[np.float64] = np.zeros(shape)
        self._host: NDArray[np.float64] = np.zeros(shape)
        for row, of_table in enumerate(options):
            for column, option in enumerate(of_table):
                self._cost[row, column] = option.cost
                self._device[row, column] = option.device_bytes
                self._host[row, column] = option.host_bytes
        self._limits = float(device_limit), float(host_limit)
        self._rows = np.arange(len(options))
        order = np.lexsort((self._device, self._cost), axis=1)
        self.chosen: NDArray[np.int64] = order[:, 0]

    def _of_chosen(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values[self._rows, self.chosen]

    def _changes(self) -> tuple[NDArray[np.float64], ...]:
        """What each option would change: cost, bytes of devices, bytes of hosts."""
        return tuple(
            values - self._of_chosen(values)[:, None]
            for values in (self._cost, self._device, self._host)
        )

    def _used(self) -> tuple[float, float]:
        return self._of_chosen(self._device).sum(), self._of_chosen(self._host).sum()

    def shrink(self) -> None:
        """Save memory where it costs least, until all fits."""
        while True:
            used = self._used()
            over = [of > limit for of, limit in zip(used, self._limits, strict=True)]
            if not any(over):
                return
            cost, *bytes_ = self._changes()
            short, other = (0, 1) if over[0] else (1, 0)
            saved = -bytes_[short]
            grows = (bytes_[other] > 0) & (used[other] + bytes_[other] > self._limits[other])
            possible = (saved > 0) & ~grows & np.isfinite(cost)
            if not possible.any():
                self._trade(used)
                continue
            # Beyond what is missing, savings are worth nothing.
            worth = np.minimum(saved, used[short] - self._limits[short])
            price = np.where(possible, cost / np.maximum(worth, 1), np.inf)
            self._take(price)

    def _trade(self, used: tuple[float, float]) -> None:
        """Exceed one memory by less than the other is exceeded now; each such change is less."""
        cost, *bytes_ = self._changes()
        excess = np.zeros_like(cost)
        now = 0.0
        for of, change, limit in zip(used, bytes_, self._limits, strict=True):
            excess += np.maximum(0, of + change - limit) / max(limit, 1)
            now += max(0.0, of - limit) / max(limit, 1)
        gain = np.where(np.isfinite(cost), now - excess, 0.0)
        if not (gain > 1e-9).any():
            raise self._failure(used)
        self._take(np.where(gain > 1e-9, cost / np.maximum(gain, 1e-9), np.inf))

    def improve(self) -> None:
        """Make changes that save cost while there is room for them."""
        while True:
            used = self._used()
            cost, device, host = self._changes()
            fits = (used[0] + device <= self._limits[0]) & (used[1] + host <= self._limits[1])
            gain = np.where(fits & (cost < 0), cost, 0.0)
            if not (gain < 0).any():
                return
            self._take(gain)

    def _take(self, price: NDArray[np.float64]) -> None:
        row, column = np.unravel_index(int(price.argmin()), price.shape)
        self.chosen[row] = column

    def _failure(self, used: tuple[float, float]) -> BudgetError:
        missing = [max(0, round(of - limit)) for of, limit in zip(used, self._limits, strict=True)]
        return BudgetError("", *missing)
