"""The command line: ``torchrec-cafe COMMAND``, each command in a module of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torchrec_cafe.planning import command as plan
from torchrec_cafe.profile import command as profile

#: Modules with ``add_parser(subparsers)``, which sets ``run(args) -> int``.
COMMANDS = (plan, profile)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; ``None``: the process's.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="torchrec-cafe", description="Embedding tables that do not fit."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(arguments)
    return args.run(args)
