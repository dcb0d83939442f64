"""Commands that a document shows, run as they stand there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.launch.torchx import ROOT


def commands_of(text: str) -> list[str]:
    """Commands of a document: lines of code blocks that begin with ``$``, without it."""
    return [command for command, _ in transcripts(text)]


def transcripts(text: str) -> list[tuple[str, list[str]]]:
    """Commands of a document, and the lines that it shows after each."""
    found: list[tuple[str, list[str]]] = []
    shows = False
    for line in text.splitlines():
        if line.startswith("    $ "):
            found.append((line.removeprefix("    $ "), []))
            shows = True
        elif shows and line.startswith("    "):
            found[-1][1].append(line.removeprefix("    "))
        else:
            shows = False
    return found


def run_command(command: str, cwd: Path = ROOT) -> str:
    """What a command prints; it must succeed, also in another folder than the checkout.

    Standard output and, after it, standard error.
    """
    binaries = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=os.environ
        | {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr
