"""What slots in the memory of a device need of it: streams, marks in them, pinned memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the work of a stream; ``torch.cuda.Event`` is one."""

    def synchronize(self) -> None:
        """Let the calling thread wait until the work before it is done."""
        ...


class Stream(ABC):
    """Work of a device that is done in order, beside that of other streams.

    All methods return before the work is done, but for what they say.
    """

    @abstractmethod
    def mark(self) -> Mark:
        """A point after all work so far."""

    @abstractmethod
    def wait_for(self, mark: Mark) -> None:
        """Let the work that comes wait for a point in the work of another stream."""

    @abstractmethod
    def keep(self, tensor: Tensor) -> None:
        """Have the memory of a tensor reused only after the work of this stream so far.

        Args:
            tensor: on the device, from another stream's work.
        """

    @abstractmethod
    def to_device(self, host: Tensor) -> Tensor:
        """Copy a tensor to the device.

        Args:
            host: on the CPU. If it is pinned it must not change before the copy is done; else it
                is copied to pinned memory before this returns.
        """

    @abstractmethod
    def to_host(self, tensor: Tensor, into: Tensor) -> None:
        """Copy a tensor from the device.

        Args:
            tensor: on the device.
            into: pinned, of the same shape and dtype; mutated when the copy is done.
        """

    @abstractmethod
    def take_rows(self, source: Tensor, rows: Tensor) -> Tensor:
        """Rows of a tensor, one after the other.

        Args:
            source: ``[R, ...]`` on the device.
            rows: int64 ``[n]`` on the device, in [0, R).
        """

    @abstractmethod
    def put_rows(self, into: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write rows of a tensor.

        Args:
            into: ``[R, ...]`` on the device; mutated.
            rows: int64 ``[n]`` on the device, in [0, R), each once.
            values: ``[n, ...]`` on the device.
        """


class Device(ABC):
    """A device with memory and streams of its own."""

    @abstractmethod
    def current(self) -> Stream:
        """The stream that takes the calling thread's work at present."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream."""

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the CPU that the device copies from and to while others work; not set."""

    @abstractmethod
    def settle(self) -> None:
        """Let the calling thread wait until all work of all streams is done."""


@final
class CudaStream(Stream):
    """A stream of a GPU.

    Args:
        stream: torch's.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """Note the stream; see the class."""
        self._stream = stream

    def mark(self) -> Mark:
        """See :meth:`Stream.mark`."""
        event = torch.cuda.Event(blocking=True)  # a thread that waits for it leaves its core alone
        event.record(self._stream)
        return event

    def wait_for(self, mark: Mark) -> None:
        """See :meth:`Stream.wait_for`."""
        assert isinstance(mark, torch.cuda.Event)
        self._stream.wait_event(mark)

    def keep(self, tensor: Tensor) -> None:
        """See :meth:`Stream.keep`."""
        tensor.record_stream(self._stream)

    def to_device(self, host: Tensor) -> Tensor:
        """See :meth:`Stream.to_device`."""
        with torch.cuda.stream(self._stream):
            # torch does not reuse pinned memory that it has allocated before such a copy is done.
            return host.pin_memory().to(self._stream.device, non_blocking=True)

    def to_host(self, tensor: Tensor, into: Tensor) -> None:
        """See :meth:`Stream.to_host`."""
        with torch.cuda.stream(self._stream):
            into.copy_(tensor, non_blocking=True)

    def take_rows(self, source: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`Stream.take_rows`."""
        with torch.cuda.stream(self._stream):
            return source.index_select(0, rows)

    def put_rows(self, into: Tensor, rows: Tensor, values: Tensor) -> None:
        """See :meth:`Stream.put_rows`."""
        with torch.cuda.stream(self._stream):
            into.index_copy_(0, rows, values)


@final
class CudaDevice(Device):
    """A GPU.

    Args:
        device: which, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        """Note the device; see the class."""
        self._device = device

    def current(self) -> Stream:
        """See :meth:`Device.current`."""
        return CudaStream(torch.cuda.current_stream(self._device))

    def stream(self) -> Stream:
        """See :meth:`Device.stream`."""
        return CudaStream(torch.cuda.Stream(self._device))

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See :meth:`Device.pinned`."""
        with torch.cuda.device(self._device):  # a thread of ours would make a context on GPU 0
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def settle(self) -> None:
        """See :meth:`Device.settle`."""
        torch.cuda.synchronize(self._device)
