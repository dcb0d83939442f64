"""What the components have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException


def ranks(
    module: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    checkout: str,
    max_restarts: int,
    **options: Any,
) -> specs.AppDef:
    """A job of ranks that torchrun starts and, where asked to, restarts.

    Args:
        module: of a checkout, run on every rank.
        arguments: of the module.
        env: of the ranks, besides what all have.
        checkout: see :func:`python_path`.
        max_restarts: how often torchrun restarts the ranks after one has died.
        options: of ``torchx.components.dist.ddp``.

    Raises:
        ComponentValidationException: if there is no checkout.
    """
    of_all = {
        "PYTHONPATH": python_path(checkout, module),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "PET_MAX_RESTARTS": str(max_restarts),
        # Otherwise ranks that are restarted look for each other where those before them were
        # (torch 2.13, pytorch/pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return dist.ddp(*arguments, m=module, env=of_all | dict(env), **options)


def python_path(checkout: str, module: str) -> str:
    """The folder that ranks import examples and benchmarks from.

    Args:
        checkout: of torchrec-cafe, on the machines or in the image that run the job; empty: the
            current folder, or else the folder that the package was installed from with
            ``pip install -e``.
        module: that has to be there, if it is here.

    Raises:
        ComponentValidationException: if ``checkout`` is empty and neither folder has the module.
    """
    if checkout:
        return checkout
    file = Path(*module.split(".")).with_suffix(".py")
    for folder in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (folder / file).is_file():
            return str(folder)
        if (folder / file.parent / "__init__.py").is_file():
            raise ComponentValidationException(
                f"{file} is not in {folder}; there are {', '.join(_programs(folder / file.parent))}"
            )
    raise ComponentValidationException(
        f"{file} is not in {Path.cwd()}: examples and benchmarks are in a checkout of "
        "torchrec-cafe, not in the installed package. Run this in a checkout, or say with "
        "--checkout where one is on the machines, or in the image, that run the job"
    )


def _programs(folder: Path) -> list[str]:
    """The modules of a folder that can be run."""
    return [path.stem for path in sorted(folder.glob("*.py")) if '"__main__":' in path.read_text()]
