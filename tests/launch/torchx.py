"""TorchX as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchx(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``torchx`` with the virtual environment's programs on the path, as TorchX needs them."""
    binaries = Path(sys.executable).parent
    return subprocess.run(
        [str(binaries / "torchx"), *arguments],
        cwd=cwd,
        env=os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def request(scheduler: str, *arguments: str) -> str:
    """What a scheduler would be asked for."""
    done = torchx("run", "--dryrun", "-s", scheduler, "--workspace", "", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("=== SCHEDULER REQUEST ===\n")[2]
