"""Checks the options of a run and prepares its data, in one process, before any rank is started.

``make train`` calls it first, so that an error is one line and not the traces of a process group.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from examples.dlrm.config import parse_args
from examples.dlrm.model import check_budgets
from examples.dlrm.train import load
from examples.process import run_main


def prepare(arguments: Sequence[str] | None = None) -> None:
    """Check the options, load the data and divide each kind's budget.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.

    Raises:
        ValueError: for options or data that cannot be used.
        OSError: if a file cannot be read or written.
    """
    config = parse_args(arguments)
    check_budgets(config, load(config))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line on standard error and exit status 2.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
    """
    return run_main(lambda: prepare(arguments))


if __name__ == "__main__":
    sys.exit(main())
