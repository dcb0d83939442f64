"""Builds the CUDA sources for the CPU: g++ and the headers of ``tests/csrc/simt`` in CUDA's place.

Two builds of the same sources: ``races`` tells data races and uninitialised shared memory, and
``memory`` has the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).parent.parent.parent
SIMT = ROOT / "tests" / "csrc" / "simt"
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "g++")

Kind = Literal["races", "memory"]

_FLAGS = (
    *("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA"),
    # What is not initialised has a value that shows.
    *("-ftrivial-auto-var-init=pattern", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
)
_CHECKS = "address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
_SANITIZE = (
    *(f"-fsanitize={_CHECKS},alignment", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    # g++ takes the checks for uses of what is not initialised.
    *("-fsanitize-sections=simt_shared", "-Wno-maybe-uninitialized"),
)


def sanitizer_environment() -> dict[str, str]:
    """The environment of a Python process that can load a library of kind ``memory``."""
    command = [COMPILER, "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # Python itself leaks.
    sanitizer = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    return os.environ | sanitizer | {"CAFE_SIMT": "memory"}


class CompileError(Exception):
    """The compiler refused; says why."""


@dataclass(frozen=True)
class Library:
    """What to build.

    Attributes:
        kind: which errors it tells.
        namespace: where its operators are registered.
        csrc: the sources; a changed copy of ours for a mutant.
        kernels: names of the files of ``csrc/cuda`` to build, without ``.cu``; none for all.
    """

    kind: Kind = "races"
    namespace: str = "torchrec_cafe_simt"
    csrc: Path = CSRC
    kernels: tuple[str, ...] = ()

    def build(self) -> Path:
        """Build what is not there, and return the library's path."""
        cuda = sorted((self.csrc / "cuda").glob("*.cu"))
        if self.kernels:
            cuda = [path for path in cuda if path.stem in self.kernels]
        sources = [*sorted(SIMT.glob("*.cpp")), *cuda]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(self._compile, sources))
        link = [COMPILER, "-shared", *(_SANITIZE if self.kind == "memory" else ())]
        libraries = [TORCH / "lib" / f"lib{name}.so" for name in ("torch", "torch_cpu", "c10")]
        # -Bsymbolic: the functions of torch that we have our own of are to be ours.
        options = ["-Wl,-z,defs", "-Wl,-Bsymbolic", "-Wl,--no-as-needed", *libraries, "-ldl"]
        return _make([*link, *objects, *options], ".so", [*objects])

    def _compile(self, source: Path) -> Path:
        flags = [*_FLAGS, f"-I{SIMT}", "-isystem", str(TORCH / "include")]
        flags += ["-O0", *_SANITIZE] if self.kind == "memory" else ["-O1", "-DSIMT_RACES"]
        read = [source, *sorted(SIMT.rglob("*.h")), *sorted(SIMT.rglob("*.cuh"))]
        if source.suffix == ".cu":
            flags += ["-x", "c++", f"-DCAFE_NAMESPACE={self.namespace}", "-DCAFE_DEVICE=CPU"]
            # So few that the loops of the kernels do loop.
            flags += ["-DCAFE_MAX_BLOCKS=2", f"-I{self.csrc}"]
            if self.kind == "races":
                flags += ["-fsanitize=thread"]
            read += [*sorted(self.csrc.rglob("*.h")), *sorted(self.csrc.rglob("*.cuh"))]
        return _make([COMPILER, *flags, "-c", str(source)], ".o", read)


def _make(command: list[str | Path], suffix: str, read: list[Path]) -> Path:
    """Run a compiler, unless it has run with the same command on the same files."""
    digest = hashlib.sha256(f"{torch.__version__} {command}".encode())
    for path in read:
        digest.update(path.read_bytes())
    made = CACHE / f"{digest.hexdigest()[:24]}{suffix}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}{suffix}")
        done = subprocess.run(
            [*command, "-o", unfinished], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise CompileError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
        unfinished.replace(made)
    return made
