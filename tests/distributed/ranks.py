"""Real gloo ranks for tests: processes, not mocks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(
    rank: int,
    world_size: int,
    num_hosts: int,
    folder: str,
    backend: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    local_world_size = world_size // num_hosts
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_world_size),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
    }
    torch.set_num_threads(1)
    status = 1
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        result = function(*args)
        torch.save(result, Path(folder) / f"result_{rank}.pt")
        dist.barrier()
        status = 0
    except BaseException:  # noqa: BLE001  reported by the parent process
        (Path(folder) / f"error_{rank}.txt").write_text(traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's teardown may abort after all is done; the result files are what counts.
    os._exit(status)


def run_ranks(
    world_size: int,
    folder: Path,
    function: Callable[..., Any],
    *args: Any,
    num_hosts: int = 1,
    backend: str = "gloo",
) -> list[Any]:
    """What ``function(*args)`` returns on each rank; with NCCL, each has a GPU.

    Ranks of different hosts are told apart by their environment only, as TorchRec does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("forkserver")
    # Imports take longer than most of what ranks do: they are done once, before the forks.
    context.set_forkserver_preload(["tests.distributed.tasks"])
    processes = [
        context.Process(
            target=_worker,
            args=(rank, world_size, num_hosts, str(folder), backend, function, args),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    for process in processes:
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error_*.txt"))]
    assert not errors, "\n".join(errors)
    assert all(process.exitcode == 0 for process in processes), "a rank died or hung"
    return [torch.load(folder / f"result_{rank}.pt") for rank in range(world_size)]
