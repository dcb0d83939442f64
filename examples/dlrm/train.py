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
from examples.dlrm.config import EXACT_KINDS, TrainConfig, parse_args
from examples.dlrm.data import ClickLog, load_click_log
from examples.dlrm.loop import Result, run
from examples.dlrm.model import check_budgets
from examples.process import rank, run_main, start


def load(config: TrainConfig) -> ClickLog:
    """The data set of a run, prepared if it is not yet.

    Args:
        config: options of the run.

    Raises:
        ValueError: for options or data that cannot be used.
        OSError: if a file cannot be read or written.
    """
    return load_click_log(
        config.data,
        cache_dir=Path(config.cache_dir),
        sample=None if config.full else config.sample,
        num_embeddings_per_feature=config.num_embeddings or None,
        progress=rank() == 0,
    )


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
    if dist.get_rank() == 0:
        print(json.dumps(dataclasses.asdict(config)))
        print(
            f"{log.description}\n{len(log.train.labels):,} training and "
            f"{len(log.test.labels):,} test samples on {dist.get_world_size()} ranks",
            flush=True,
        )
    results = []
    for seed in config.seed:
        for kind in config.kinds:
            for compression in (1.0,) if kind in EXACT_KINDS else config.compression:
                results.append(run(config, log, kind, compression, seed))
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
