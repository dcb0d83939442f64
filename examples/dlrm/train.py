"""Trains a TorchRec DLRM with full, hashed and CAFE tables on the same data, and compares them.

``torchx run -s local_cwd torchx_components/dlrm.py:train`` starts it on two ranks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import PlannerError

from examples.dlrm import report
from examples.dlrm.config import TrainConfig, parse_args
from examples.dlrm.data import ClickLog, hold_out, load_click_log
from examples.dlrm.loop import Result, Training, cases
from examples.dlrm.memory import keep_freed_pages
from examples.dlrm.model import check_budgets

#: exit status after an error that is the caller's to mend
ERROR_STATUS = 2


def load(config: TrainConfig) -> ClickLog:
    """The data set of a run, prepared if it is not yet; with samples held out to validate on.

    Args:
        config: options of the run.

    Raises:
        ValueError: for options or data that cannot be used.
        OSError: if a file cannot be read or written.
    """
    log = load_click_log(
        config.data,
        cache_dir=Path(config.cache_dir),
        sample=None if config.full else config.sample,
        num_embeddings_per_feature=config.num_embeddings or None,
        progress=_rank() == 0,
    )
    return hold_out(log, config.validation_share) if config.validate_every else log


def _rank() -> int:
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


def quieten() -> None:
    """Keep other packages' notices from burying the progress bars."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)


def train(config: TrainConfig) -> list[Result]:
    """Train every kind, compression and seed in turn, and write the report.

    Args:
        config: options of the run.

    Raises:
        ValueError: for options or data that cannot be used.
        OSError: if a file cannot be read or written.
    """
    log = load(config)
    check_budgets(config, log)
    start()
    describe(config, log)
    results = []
    for case in cases(config):
        training = Training(config, log, case)
        training.train()
        result = training.test()
        if config.profile_steps:
            result = dataclasses.replace(result, step_parts=training.profile(config.profile_steps))
        results.append(result)
    if dist.get_rank() == 0:
        print(f"\n{report.save(config, log, results)}\n\nreport: {config.out}/report.md")
    return results


def describe(config: TrainConfig, log: ClickLog) -> None:
    """Print the options and what the data is; rank 0 only.

    Args:
        config: options of the run.
        log: the data set.
    """
    if dist.get_rank() == 0:
        held_out = f"{len(log.validation):,} validation and " if log.validation else ""
        print(json.dumps(dataclasses.asdict(config)))
        print(
            f"{log.description}\n{len(log.train):,} training, {held_out}"
            f"{len(log.test):,} test samples on {dist.get_world_size()} ranks",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line on standard error and exit status 2.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
    """
    return run_command(lambda: train(parse_args(arguments)))


def run_command(command: Callable[[], object]) -> int:
    """Run what all ranks were started for; errors are one line on standard error.

    Args:
        command: what to do.

    Returns:
        The exit status; a process that has joined a process group ends here if all went well.
    """
    quieten()
    try:
        command()
    except (ValueError, OSError, PlannerError) as error:
        if _rank() == 0:
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


if __name__ == "__main__":
    sys.exit(main())
