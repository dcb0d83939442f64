"""Where the rows of look-ahead tables lie when they are not in a scratchpad.

Shape legend: R rows of all tables of a pool, D columns, n rows that move.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from torchrec_cafe.ops import advise_huge_pages, copy_rows, read_rows, write_rows

#: What O_DIRECT moves, at least.
BLOCK_BYTES = 512
#: Rows in memory that are worth a thread.
ROWS_PER_THREAD = 2048


class RowStore(ABC):
    """Rows and their optimizer state.

    Attributes:
        tensors: ``[R, ...]``, weights first, then the states; what is read and written here is what
            is in the store.
    """

    tensors: list[Tensor]

    @abstractmethod
    def read(self, rows: Tensor, into: Sequence[Tensor], at: Tensor) -> None:
        """Copy rows out of the store.

        Args:
            rows: int64 ``[n]``, which.
            into: tensors like :attr:`tensors`, mutated.
            at: int64 ``[n]``, their rows.

        Raises:
            OSError: if the store cannot be read.
        """

    @abstractmethod
    def write(self, rows: Tensor, source: Sequence[Tensor], at: Tensor) -> None:
        """Copy rows into the store.

        Args:
            rows: int64 ``[n]``, which, each once.
            source: tensors like :attr:`tensors`.
            at: int64 ``[n]``, their rows.

        Raises:
            OSError: if the store cannot be written.
        """

    def exchange(
        self,
        slots: Sequence[Tensor],
        out: tuple[Tensor, Tensor],
        into: tuple[Tensor, Tensor],
    ) -> None:
        """Write some rows, then read others into the slots that these leave, and more.

        Args:
            slots: tensors like :attr:`tensors`, mutated.
            out: int64 ``[n]``, rows to write, and where they lie.
            into: int64 ``[m]``, rows to read, none of which is written, and where to.

        Raises:
            OSError: if the store cannot be read or written.
        """
        self.write(out[0], slots, out[1])
        self.read(into[0], slots, into[1])

    @abstractmethod
    def sync(self) -> None:
        """Return when everything that was written would survive the process and the machine."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its state."""
        return sum(t[0].numel() * t.element_size() for t in self.tensors if len(t))


@final
class MemoryStore(RowStore):
    """Rows in memory.

    Args:
        num_rows: R.
        like: tensors whose columns and dtypes the rows have, on any device; weights start at 0,
            states at the value of the first element.
        num_threads: that copy rows, >= 1. The training has use for the cores of a machine without
            a GPU.
    """

    def __init__(self, num_rows: int, like: Sequence[Tensor], *, num_threads: int = 1) -> None:
        """Allocate; see the class."""
        self._num_threads = num_threads
        self._copiers = ThreadPoolExecutor(num_threads, thread_name_prefix="rows in memory")
        self.tensors = [
            torch.empty((num_rows, *tensor.shape[1:]), dtype=tensor.dtype) for tensor in like
        ]
        for tensor in self.tensors:  # before they are first written
            advise_huge_pages(tensor)
        self.tensors[0].zero_()
        _start(self.tensors[1:], like[1:])

    def read(self, rows: Tensor, into: Sequence[Tensor], at: Tensor) -> None:
        """See :meth:`RowStore.read`."""
        for tensor, target in zip(self.tensors, into, strict=True):
            self._copy(target, at, tensor, rows)

    def write(self, rows: Tensor, source: Sequence[Tensor], at: Tensor) -> None:
        """See :meth:`RowStore.write`."""
        for tensor, given in zip(self.tensors, source, strict=True):
            self._copy(tensor, rows, given, at)

    def _copy(self, into: Tensor, into_rows: Tensor, source: Tensor, rows: Tensor) -> None:
        parts = max(1, min(self._num_threads, len(rows) // ROWS_PER_THREAD))
        if parts == 1:
            return copy_rows(into, into_rows, source, rows)
        numbers = zip(into_rows.tensor_split(parts), rows.tensor_split(parts), strict=True)
        copied = [self._copiers.submit(copy_rows, into, to, source, of) for to, of in numbers]
        for part in copied:
            part.result()

    def sync(self) -> None:
        """Nothing: memory does not survive."""


@final
class FileStore(RowStore):
    """Rows in files: one for the weights, and one for each state that is as wide as they are.

    The files are the working copy of one process, which locks them: they are made anew, and what
    they hold after a crash is a mixture of old and new rows. Checkpoints are what survives.

    Rows are moved by ``pread`` and ``pwrite`` on several threads, so that the disk sees many
    requests at a time. Where rows are whole blocks of 512 bytes and the file system allows it, they
    pass by the page cache (``O_DIRECT``): it would read a page to change a part of it, and hold
    rows that the slots hold already. :attr:`tensors` map the files, for whoever wants whole tables.
    A state of a number per row stays in memory: a disk would move a block for each.

    Args:
        directory: where the files lie; made if there is none.
        num_rows: R.
        like: as in :class:`MemoryStore`.
        io_threads: requests at a time, in [1, 1024].

    Raises:
        ValueError: if somebody else uses the files.
        OSError: if the files cannot be made, or the disk is too small.
    """

    def __init__(
        self, directory: Path, num_rows: int, like: Sequence[Tensor], *, io_threads: int
    ) -> None:
        """Make the files; see the class."""
        self._io_threads = io_threads
        self._files: list[int | None] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rows to files")
        self.tensors = []
        directory.mkdir(parents=True, exist_ok=True)
        for number, tensor in enumerate(like):
            shape = (num_rows, *tensor.shape[1:])
            if tensor.dim() == 1:
                self._files.append(None)
                self.tensors.append(torch.empty(shape, dtype=tensor.dtype))
            else:
                name = "weights" if number == 0 else f"state_{number}"
                self._add(directory / name, shape, tensor.dtype)
        _start(self.tensors[1:], like[1:])

    def _add(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = max(1, torch.Size(shape).numel()) * dtype.itemsize
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._files.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"{path} is in use by another training, or by a process that it has left: give "
                "each training a `path` of its own"
            ) from None
        os.ftruncate(file, 0)
        os.posix_fallocate(file, 0, size)  # a full disk shows now, not as a SIGBUS later
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        whole = torch.from_file(str(path), shared=True, size=size // dtype.itemsize, dtype=dtype)
        self.tensors.append(whole[: torch.Size(shape).numel()].view(shape))
        if torch.Size(shape[1:]).numel() * dtype.itemsize % BLOCK_BYTES == 0:
            _pass_by_page_cache(file, self.tensors[-1])

    def read(self, rows: Tensor, into: Sequence[Tensor], at: Tensor) -> None:
        """See :meth:`RowStore.read`."""
        for file, tensor, target in zip(self._files, self.tensors, into, strict=True):
            if file is None:
                copy_rows(target, at, tensor, rows)
            else:
                read_rows(file, rows, target, at, num_threads=self._io_threads)

    def write(self, rows: Tensor, source: Sequence[Tensor], at: Tensor) -> None:
        """See :meth:`RowStore.write`."""
        for file, tensor, given in zip(self._files, self.tensors, source, strict=True):
            if file is None:
                copy_rows(tensor, rows, given, at)
            else:
                write_rows(file, rows, given, at, num_threads=self._io_threads)

    def exchange(
        self,
        slots: Sequence[Tensor],
        out: tuple[Tensor, Tensor],
        into: tuple[Tensor, Tensor],
    ) -> None:
        """See :meth:`RowStore.exchange`; writes and reads go on at the same time."""
        rows, at = out
        order = torch.arange(len(rows))
        leaving = [tensor.new_empty((len(rows), *tensor.shape[1:])) for tensor in slots]
        for kept, tensor in zip(leaving, slots, strict=True):
            copy_rows(kept, order, tensor, at)
        written = self._writer.submit(self.write, rows, leaving, order)
        try:
            self.read(into[0], slots, into[1])
        finally:
            written.result()

    def sync(self) -> None:
        """See :meth:`RowStore.sync`."""
        for file in self._files:
            if file is not None:
                os.fsync(file)

    def close(self) -> None:
        """Let go of the files; the store is of no use any more."""
        for file in self._files:
            if file is not None:
                os.close(file)
        self._files = []
        self._writer.shutdown(wait=False)

    def __del__(self) -> None:
        """Let go of the files."""
        self.close()


def _pass_by_page_cache(file: int, rows: Tensor) -> None:
    """Set O_DIRECT, if the file system can do it, in blocks as small as rows."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
    try:
        last = torch.tensor([len(rows) - 1] if len(rows) else [], dtype=torch.int64)
        into = rows.new_empty((1, *rows.shape[1:]))
        read_rows(file, last, into, torch.zeros_like(last), num_threads=1)
    except OSError:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)


def _start(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    for tensor, pattern in zip(tensors, like, strict=True):
        if pattern.numel():
            tensor.fill_(pattern.flatten()[0].item())
