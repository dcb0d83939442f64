"""The processes of the examples: how they begin, end and report errors."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import PlannerError

from examples.dlrm.memory import keep_freed_pages

#: exit status after an error that is the caller's to mend
ERROR_STATUS = 2


def rank() -> int:
    """Of this process, before it has joined the others."""
    return int(os.environ.get("RANK", "0"))


def start() -> None:
    """Join the process group, with this rank's share of the cores."""
    # A process that nothing has launched is alone, and needs no port, which may be taken.
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    keep_freed_pages()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", **alone)


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def quieten() -> None:
    """Keep other packages' notices from burying the progress bars."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)


def run_main(work: Callable[[], object]) -> int:
    """Do the work of a command; errors are one line on standard error and exit status 2.

    Args:
        work: reads the command line, joins the other ranks, does all.
    """
    quieten()
    try:
        work()
    except (ValueError, OSError, PlannerError) as error:
        if rank() == 0:
            first, *others = (line.strip() for line in str(error).splitlines() or [""])
            print(f"error: {' '.join([first, '; '.join(others)]).strip()}", file=sys.stderr)
        return ERROR_STATUS
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if dist.is_initialized():
        dist.barrier()
        # gloo's teardown may abort after all is done, and turn success into failure.
        os._exit(0)
    return 0
