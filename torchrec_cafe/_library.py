"""Loads the native operators, registered as ``torch.ops.torchrec_cafe.*``."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def find_library(name: str, directories: Iterable[str]) -> Path | None:
    """Return the shared library ``name`` in the first of ``directories`` that has it.

    An editable install keeps libraries apart from the sources, so the package has two directories.
    """
    for directory in directories:
        path = Path(directory) / f"{name}.so"
        if path.is_file():
            return path
    return None


def load_operators(directories: Iterable[str]) -> bool:
    """Load the operators and, where torch has CUDA, their CUDA kernels.

    Args:
        directories: where to look; the package's ``__path__``.

    Returns:
        Whether the CUDA kernels were loaded.

    Raises:
        ImportError: if the library of the operators is missing or a library does not load.
    """
    directories = list(directories)
    path = find_library("_C", directories)
    if path is None:
        raise ImportError(
            f"torchrec_cafe: its native library _C.so is not in {', '.join(directories)}: "
            "it was not built. Run `make build`, or install the package with "
            "`pip install --no-build-isolation .`; a source tree on PYTHONPATH does not suffice."
        )
    _load(path)
    if torch.version.cuda is None:
        return False
    path = find_library("_C_cuda", directories)
    if path is None:
        if torch.cuda.is_available():
            logger.warning(
                "torchrec_cafe was built without CUDA kernels, so its tables work on CPU only; "
                "reinstall it with nvcc on PATH: `pip install --no-build-isolation .`"
            )
        return False
    _load(path)
    return True


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"torchrec_cafe: {path} does not load in torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}): {error.__cause__ or error}\n"
            "Causes: torch is older than 2.11, or was exchanged for one of another CUDA major "
            "version since the build; or the build is stale. "
            "Rebuild with `make build` or `pip install --no-build-isolation --force-reinstall "
            "--no-deps .`."
        ) from error
