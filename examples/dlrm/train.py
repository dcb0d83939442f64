"""Trains a TorchRec DLRM with full, hashed and CAFE tables on the same data, and compares them.

``torchx run -s local_cwd torchx_components/dlrm.py:train`` starts it on two ranks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from examples.dlrm import report
from examples.dlrm.config import TrainConfig, parse_args
from examples.dlrm.data import ClickLog, hold_out, load_click_log
from examples.dlrm.loop import Result, Training, cases
from examples.dlrm.model import check_budgets
from examples.process import rank, run_main, start


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
        progress=rank() == 0,
    )
    return hold_out(log, config.validation_share) if config.validate_every else log


def begin(config: TrainConfig) -> ClickLog:
    """Load the data, join the process group, and print the options and what the data is.

    Args:
        config: options of the run.

    Returns:
        The data set.

    Raises:
        ValueError: for options or data that cannot be used.
        OSError: if a file cannot be read or written.
    """
    log = load(config)
    check_budgets(config, log)
    start()
    if dist.get_rank() == 0:
        held_out = f"{len(log.validation):,} validation and " if log.validation else ""
        print(json.dumps(dataclasses.asdict(config)))
        print(
            f"{log.description}\n{len(log.train):,} training, {held_out}"
            f"{len(log.test):,} test samples on {dist.get_world_size()} ranks",
            flush=True,
        )
    return log


def train(config: TrainConfig) -> list[Result]:
    """Train every kind, compression and seed in turn, and write the report.

    Args:
        config: options of the run.

    Raises:
        ValueError: for options or data that cannot be used.
        OSError: if a file cannot be read or written.
    """
    log = begin(config)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line on standard error and exit status 2.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
    """
    return run_main(lambda: train(parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
