"""Where the slots of a scratchpad are, and how rows get there and back.

Rows move while the training goes on. In the memory of a device that takes streams of their own:
marks say what of the training a move has to wait for, and what of the moves the training has to
wait for. In the memory of the CPU everything is done when it returns, and a mark is ``None``.

Shape legend: S slots, n rows that move, N occurrences, B samples, F features.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from torchrec_cafe.tables.device_streams import CudaDevice, Device, Mark, Stream
from torchrec_cafe.tables.row_store import RowStore

#: Bytes of rows on their way that a piece of pinned memory takes; there are two each way.
STAGING_BYTES = 1 << 25


class PlacedBags(NamedTuple):
    """A batch's bags of slots, where the slots are.

    Attributes:
        slots: int64 ``[N]``, slot of each occurrence, sample-major.
        offsets: int64 ``[B * F + 1]``, where each bag starts.
    """

    slots: Tensor
    offsets: Tensor


class SlotMemory(ABC):
    """Slots of rows and their optimizer states.

    Attributes:
        tensors: ``[S, ...]``, weights first.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Note the tensors; see the class."""
        self.tensors = list(tensors)

    @property
    def num_slots(self) -> int:
        """Rows that fit."""
        return len(self.tensors[0])

    # --- called by the thread that moves rows ----------------------------------------------------

    @abstractmethod
    def exchange(
        self, store: RowStore, out: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor]
    ) -> None:
        """Write some rows to a store, then read others into the slots that these leave, and more.

        The store is up to date when this returns. Slots are, once :meth:`moved` says so.

        Args:
            store: mutated.
            out: int64 ``[n]``, rows to write, and their slots.
            into: int64 ``[m]``, rows to read, none of which is written, and their slots.

        Raises:
            OSError: if the store cannot be read or written.
        """

    @abstractmethod
    def spill(self, store: RowStore, rows: Tensor, slots: Tensor) -> None:
        """Write rows to a store; it is up to date when this returns.

        Args:
            store: mutated.
            rows: int64 ``[n]``, which, each once.
            slots: int64 ``[n]``, where they are.

        Raises:
            OSError: if the store cannot be written.
        """

    @abstractmethod
    def fill(self, store: RowStore, rows: Tensor, slots: Tensor) -> None:
        """Read rows of a store into slots; they are there once :meth:`moved` says so.

        Args:
            store: holds the rows.
            rows: int64 ``[n]``, which.
            slots: int64 ``[n]``, where to, each once.

        Raises:
            OSError: if the store cannot be read.
        """

    @abstractmethod
    def place(self, slots: Tensor, offsets: Tensor) -> PlacedBags:
        """Copy a batch's bags to where the slots are; they are there once :meth:`moved` says so.

        Args:
            slots: int64 ``[N]``, on the CPU.
            offsets: int64 ``[B * F + 1]``, on the CPU.
        """

    @abstractmethod
    def moved(self) -> Mark | None:
        """All moves so far."""

    @abstractmethod
    def wait_for(self, mark: Mark | None) -> None:
        """Let moves that come after this wait for what was marked."""

    @abstractmethod
    def settle(self) -> None:
        """Let the calling thread wait for all that anybody has asked of the device."""

    # --- called by the thread that trains --------------------------------------------------------

    @abstractmethod
    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to copy tensors to the CPU.

        Args:
            tensors: where the slots are, as the calling thread's work until now leaves them.

        Returns:
            What waits for the copies and gives them; for any thread.
        """

    @abstractmethod
    def bring(self, host: Tensor) -> Tensor:
        """Copy a tensor from the CPU to where the slots are, for the calling thread's work."""

    @abstractmethod
    def used(self) -> Mark | None:
        """What the calling thread has asked of the device until now."""

    @abstractmethod
    def meet(self, mark: Mark | None, bags: PlacedBags) -> None:
        """Let the work of the calling thread wait for moves.

        Args:
            mark: of :meth:`moved`.
            bags: what the work is going to use.
        """


@final
class HostSlots(SlotMemory):
    """Slots in the memory of the CPU.

    Args:
        tensors: ``[S, ...]``, weights first; mutated by moves.
    """

    def exchange(
        self, store: RowStore, out: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor]
    ) -> None:
        """See :meth:`SlotMemory.exchange`."""
        store.exchange(self.tensors, out, into)

    def spill(self, store: RowStore, rows: Tensor, slots: Tensor) -> None:
        """See :meth:`SlotMemory.spill`."""
        store.write(rows, self.tensors, slots)

    def fill(self, store: RowStore, rows: Tensor, slots: Tensor) -> None:
        """See :meth:`SlotMemory.fill`."""
        store.read(rows, self.tensors, slots)

    def place(self, slots: Tensor, offsets: Tensor) -> PlacedBags:
        """The bags themselves."""
        return PlacedBags(slots, offsets)

    def moved(self) -> None:
        """Nothing: moves are done when they return."""

    def wait_for(self, mark: Mark | None) -> None:
        """Nothing: what was marked is done."""

    def settle(self) -> None:
        """Nothing: all is done."""

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """The tensors themselves."""
        return lambda: list(tensors)

    def bring(self, host: Tensor) -> Tensor:
        """The tensor itself."""
        return host

    def used(self) -> None:
        """Nothing: work is done when it returns."""

    def meet(self, mark: Mark | None, bags: PlacedBags) -> None:
        """Nothing: moves are done."""


class _Staging:
    """Pinned memory for rows on their way, and for their slots.

    Args:
        device: copies from and to it.
        like: tensors whose columns and dtypes the rows have.
        rows: that fit.
    """

    def __init__(self, device: Device, like: Sequence[Tensor], rows: int) -> None:
        self.slots = device.pinned((rows,), torch.int64)
        self.rows = [device.pinned((rows, *tensor.shape[1:]), tensor.dtype) for tensor in like]
        self.done: Mark | None = None

    def wait(self) -> None:
        """Wait until the device has no use for it any more."""
        if self.done is not None:
            self.done.synchronize()
            self.done = None


@final
class DeviceSlots(SlotMemory):
    """Slots in the memory of a device, whose streams do the copies beside the training.

    Rows are collected in pinned memory by the CPU and copied from there, and back, piece by piece;
    a piece's memory is used again when its copies are done.

    Args:
        tensors: ``[S, ...]`` on the device, weights first; mutated by moves.
        device: the device.
        staging_bytes: of rows in one piece, >= 1; at least a row.
    """

    def __init__(
        self, tensors: Sequence[Tensor], device: Device, staging_bytes: int = STAGING_BYTES
    ) -> None:
        """Make streams and pinned memory; see the class."""
        # `.data`: another version counter. Autograd saves the slots for the backward pass, and
        # moves change only those that it has no use for.
        super().__init__([tensor.data for tensor in tensors])
        self._device = device
        self._moves = device.stream()
        self._ids = device.stream()  # must not wait behind rows
        row_bytes = sum(t[:1].numel() * t.element_size() for t in self.tensors)
        self._piece = max(1, min(self.num_slots, staging_bytes // row_bytes))
        pieces = [_Staging(device, self.tensors, self._piece) for _ in range(4)]
        self._leaving, self._coming = pieces[:2], itertools.cycle(pieces[2:])

    def exchange(
        self, store: RowStore, out: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor]
    ) -> None:
        """See :meth:`SlotMemory.exchange`."""
        leaving = self._leave(store, *out)  # before their slots are filled, on the same stream
        try:
            self.fill(store, *into)
        finally:
            for staging, rows in leaving:
                _arrive(store, staging, rows)

    def spill(self, store: RowStore, rows: Tensor, slots: Tensor) -> None:
        """See :meth:`SlotMemory.spill`."""
        for staging, part in self._leave(store, rows, slots):
            _arrive(store, staging, part)

    def _leave(
        self, store: RowStore, rows: Tensor, slots: Tensor
    ) -> deque[tuple[_Staging, Tensor]]:
        """Begin to write rows to a store; gives those that are on their way yet."""
        free, leaving = deque(self._leaving), deque[tuple[_Staging, Tensor]]()
        for part, at in self._pieces(rows, slots):
            if not free:
                free.append(_arrive(store, *leaving.popleft()))
            staging = free.popleft()
            index = self._send(staging, at)
            for tensor, kept in zip(self.tensors, staging.rows, strict=True):
                self._moves.to_host(self._moves.take_rows(tensor, index), kept[: len(at)])
            staging.done = self._moves.mark()
            leaving.append((staging, part))
        return leaving

    def fill(self, store: RowStore, rows: Tensor, slots: Tensor) -> None:
        """See :meth:`SlotMemory.fill`."""
        for part, at in self._pieces(rows, slots):
            staging = next(self._coming)
            staging.wait()
            store.read(part, staging.rows, torch.arange(len(part)))
            index = self._send(staging, at)
            for tensor, kept in zip(self.tensors, staging.rows, strict=True):
                values = self._moves.to_device(kept[: len(at)])
                self._moves.put_rows(tensor, index, values)
            staging.done = self._moves.mark()

    def _pieces(self, rows: Tensor, slots: Tensor) -> list[tuple[Tensor, Tensor]]:
        if len(rows) == 0:
            return []
        return list(zip(rows.split(self._piece), slots.split(self._piece), strict=True))

    def _send(self, staging: _Staging, slots: Tensor) -> Tensor:
        """Slots, on the device."""
        staged = staging.slots[: len(slots)]
        staged.copy_(slots)
        return self._moves.to_device(staged)

    def place(self, slots: Tensor, offsets: Tensor) -> PlacedBags:
        """See :meth:`SlotMemory.place`."""
        return PlacedBags(self._moves.to_device(slots), self._moves.to_device(offsets))

    def moved(self) -> Mark | None:
        """See :meth:`SlotMemory.moved`."""
        return self._moves.mark()

    def wait_for(self, mark: Mark | None) -> None:
        """See :meth:`SlotMemory.wait_for`; ``None``: nothing was asked of the device."""
        if mark is not None:
            self._moves.wait_for(mark)

    def settle(self) -> None:
        """See :meth:`SlotMemory.settle`."""
        self._device.settle()

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """See :meth:`SlotMemory.fetch`."""
        self._ids.wait_for(self._device.current().mark())
        copies = []
        for tensor in tensors:
            copies.append(self._device.pinned(tensor.shape, tensor.dtype))
            self._ids.to_host(tensor, copies[-1])
            self._ids.keep(tensor)
        arrived = self._ids.mark()

        def wait() -> list[Tensor]:
            arrived.synchronize()
            return copies

        return wait

    def bring(self, host: Tensor) -> Tensor:
        """See :meth:`SlotMemory.bring`."""
        return self._device.current().to_device(host)

    def used(self) -> Mark | None:
        """See :meth:`SlotMemory.used`."""
        return self._device.current().mark()

    def meet(self, mark: Mark | None, bags: PlacedBags) -> None:
        """See :meth:`SlotMemory.meet`."""
        current: Stream = self._device.current()
        if mark is not None:
            current.wait_for(mark)
        for tensor in bags:
            current.keep(tensor)


def _arrive(store: RowStore, staging: _Staging, rows: Tensor) -> _Staging:
    """Wait for rows that leave, write them to the store, and give their memory back."""
    staging.wait()
    store.write(rows, staging.rows, torch.arange(len(rows)))
    return staging


def slot_memory(tensors: Sequence[Tensor]) -> SlotMemory:
    """The memory that holds slots.

    Args:
        tensors: ``[S, ...]``, weights first, all on the CPU or all on one GPU.
    """
    if tensors[0].is_cpu:
        return HostSlots(tensors)
    return DeviceSlots(tensors, CudaDevice(tensors[0].device))
