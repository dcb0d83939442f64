"""A device in tests: its work is done late, in an order that a seed decides.

Work of a stream is queued, and done when somebody has to wait for it, or now and then by chance.
Results hold nonsense until then. Nothing but what streams and marks promise holds.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchrec_cafe.tables.device_streams import Device, Mark, Stream


class SimulatedMark(Mark):
    """A number of tasks of a stream."""

    def __init__(self, stream: SimulatedStream, position: int) -> None:
        self.stream = stream
        self.position = position

    @property
    def is_done(self) -> bool:
        return self.stream.done >= self.position

    def synchronize(self) -> None:
        with self.stream.device.lock:
            self.stream.run(self.position)


class SimulatedStream(Stream):
    """Tasks, of which some are done."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.tasks: list[Callable[[], object] | SimulatedMark] = []
        self.done = 0
        self.kept: set[int] = set()

    def call(self, task: Callable[[], object] | SimulatedMark) -> None:
        """Queue a task, or a mark to wait for."""
        with self.device.lock:
            self.tasks.append(task)
            self.device.chance()

    def run(self, position: int) -> None:
        """Do tasks, and those of other streams that they wait for."""
        while self.done < position:
            task = self.tasks[self.done]
            if isinstance(task, SimulatedMark):
                task.synchronize()
            else:
                task()
            self.tasks[self.done] = _nothing
            self.done += 1

    @property
    def can_run(self) -> bool:
        """Whether there is a task that waits for none of another stream."""
        if self.done == len(self.tasks):
            return False
        task = self.tasks[self.done]
        return not isinstance(task, SimulatedMark) or task.is_done

    def uses(self, *tensors: Tensor) -> None:
        """Check that memory of other streams is kept for the tasks of this one."""
        for tensor in tensors:
            home = self.device.homes.get(tensor.data_ptr())
            assert home in (None, self) or tensor.data_ptr() in self.kept, "memory is not kept"

    def _result(self, like: Tensor) -> Tensor:
        result = self.device.nonsense(like.shape, like.dtype)
        self.device.homes[result.data_ptr()] = self
        self.device.alive.append(result)  # no other tensor gets its address
        return result

    def mark(self) -> Mark:
        return SimulatedMark(self, len(self.tasks))

    def wait_for(self, mark: Mark) -> None:
        if isinstance(mark, SimulatedMark):
            self.call(mark)

    def keep(self, tensor: Tensor) -> None:
        self.kept.add(tensor.data_ptr())

    def to_device(self, host: Tensor) -> Tensor:
        pinned = host.untyped_storage().data_ptr() in self.device.pinned_storages
        source = host if pinned else host.clone()
        result = self._result(host)
        self.call(lambda: result.copy_(source))
        return result

    def to_host(self, tensor: Tensor, into: Tensor) -> None:
        assert into.untyped_storage().data_ptr() in self.device.pinned_storages
        self.uses_or_will_keep(tensor)
        self.call(lambda: into.copy_(tensor))

    def uses_or_will_keep(self, tensor: Tensor) -> None:
        """Check after the next call, which may keep the tensor."""
        self.device.to_check.append((self, tensor))

    def take_rows(self, source: Tensor, rows: Tensor) -> Tensor:
        self.uses(rows)
        result = self._result(source[: len(rows)])
        self.call(lambda: result.copy_(source.index_select(0, rows)))
        return result

    def put_rows(self, into: Tensor, rows: Tensor, values: Tensor) -> None:
        self.uses(rows, values)
        self.call(lambda: into.index_copy_(0, rows, values))


class EagerStream(Stream):
    """The stream of a training that does everything at once."""

    def mark(self) -> Mark:
        return _Done()

    def wait_for(self, mark: Mark) -> None:
        mark.synchronize()

    def keep(self, tensor: Tensor) -> None:
        pass

    def to_device(self, host: Tensor) -> Tensor:
        return host.clone()

    def to_host(self, tensor: Tensor, into: Tensor) -> None:
        into.copy_(tensor)

    def take_rows(self, source: Tensor, rows: Tensor) -> Tensor:
        return source.index_select(0, rows)

    def put_rows(self, into: Tensor, rows: Tensor, values: Tensor) -> None:
        into.index_copy_(0, rows, values)


class SimulatedDevice(Device):
    """Streams whose work is done late.

    Args:
        seed: of the order.
        eager: whether the training's own work is done at once, as code for the CPU does it.
    """

    def __init__(self, seed: int, *, eager: bool = False) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.haste = self.random.choice((0.0, 0.1, 0.5))
        self.streams: list[SimulatedStream] = []
        self.pinned_storages: set[int] = set()
        self.alive: list[Tensor] = []
        self.homes: dict[int, SimulatedStream] = {}
        self.to_check: list[tuple[SimulatedStream, Tensor]] = []
        self.training = EagerStream() if eager else self.stream()

    def current(self) -> Stream:
        return self.training

    def stream(self) -> SimulatedStream:
        self.streams.append(SimulatedStream(self))
        return self.streams[-1]

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = self.nonsense(shape, dtype)
        self.alive.append(memory)
        self.pinned_storages.add(memory.untyped_storage().data_ptr())
        return memory

    def nonsense(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else 0, dtype=dtype)

    def settle(self) -> None:
        with self.lock:
            for stream in self.streams:
                stream.run(len(stream.tasks))
            for stream, tensor in self.to_check:
                stream.uses(tensor)
            self.to_check.clear()

    def chance(self) -> None:
        """Do some work, or none."""
        while self.random.random() < self.haste:
            ready = [stream for stream in self.streams if stream.can_run]
            if not ready:
                return
            stream = self.random.choice(ready)
            stream.run(stream.done + 1)


class _Done(Mark):
    def synchronize(self) -> None:
        pass


def _nothing() -> None:
    pass
