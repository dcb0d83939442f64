"""Where the CUDA kernels run: on a GPU, or on the CPU as fibers (``tests/csrc/simt``)."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.library import _scoped_library

from tests.simt.build import Library

P = ParamSpec("P")
T = TypeVar("T")

#: as in ``tests/csrc/simt/scheduler.h``
SCHEDULES = ("in_order", "reversed", "random", "one_warp_ahead", "lockstep")


class Device(Protocol):
    """Runs the CUDA kernels."""

    #: how many ids and the like a test takes
    size: int

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor where the kernels find it."""
        ...

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of ``torchrec_cafe.ops`` so that it takes the CUDA kernels."""
        ...


class Gpu:
    """The GPU."""

    size = 5000

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.cuda()

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)


class Simt:
    """The CPU: a library of the kernels, registered for CPU tensors under its own namespace."""

    size = 600  # more threads than the blocks have that a library built for tests launches

    def __init__(self, library: Library) -> None:
        self.path = library.build()
        self.namespace = library.namespace
        self.names = _operators_of(library)
        # The schemas are those of the operators.
        self._definitions = torch.library.Library(library.namespace, "DEF")
        for name in self.names:
            schema = str(getattr(torch.ops.torchrec_cafe, name).default._schema)
            self._definitions.define(schema.removeprefix("torchrec_cafe::"))
        torch.ops.load_library(str(self.path))
        self._native = ctypes.CDLL(str(self.path))
        self._native.simt_set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._kernels_in_place():
            try:
                return function(*args, **kwargs)
            except (RuntimeError, ValueError) as error:
                error.add_note(self._lines(str(error)))
                raise

    def set_schedule(self, schedule: str, seed: int = 0) -> None:
        """Say which thread runs next; see ``scheduler.h``."""
        self._native.simt_set_schedule(SCHEDULES.index(schedule), seed)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """As if a CUDA graph were captured: the host may not wait for the device."""
        self._native.simt_capture(True)
        try:
            yield
        finally:
            self._native.simt_capture(False)

    @contextmanager
    def unordered_writes(self) -> Iterator[None]:
        """For malformed input: which of several bags writes last is no matter."""
        self._native.simt_detect_races(False)
        try:
            yield
        finally:
            self._native.simt_detect_races(True)

    def fail_launch(self, number: int) -> None:
        """Let the launch of that number from now on fail; -1 for none."""
        self._native.simt_fail_launch(number)

    def launches(self) -> int:
        """Launches since :meth:`fail_launch`."""
        return self._native.simt_launches()

    @contextmanager
    def _kernels_in_place(self) -> Iterator[None]:
        with _scoped_library("torchrec_cafe", "IMPL") as library, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            for name in self.names:
                kernel: Any = getattr(getattr(torch.ops, self.namespace), name).default
                library.impl(name, kernel, "CPU", allow_override=True)
            # What torch leaves uninitialised gets a value that shows.
            torch.use_deterministic_algorithms(True)
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(False)

    def _lines(self, message: str) -> str:
        code = re.search(r"\+(0x[0-9a-f]+)", message)
        if code is None:
            return ""
        command = ["addr2line", "-i", "-e", str(self.path), code[1]]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@functools.cache
def simulated() -> Simt:
    """The kernels as they are, built as ``CAFE_SIMT`` says (``races`` or ``memory``)."""
    return Simt(Library(kind="memory" if os.environ.get("CAFE_SIMT") == "memory" else "races"))


def _operators_of(library: Library) -> tuple[str, ...]:
    texts = [path.read_text() for path in _kernel_files(library)]
    return tuple(name for text in texts for name in re.findall(r'm\.impl\("(\w+)"', text))


def _kernel_files(library: Library) -> list[Path]:
    paths = sorted((library.csrc / "cuda").glob("*.cu"))
    return [path for path in paths if not library.kernels or path.stem in library.kernels]
