"""Trains two towers with full, hashed and CAFE tables on the same purchases, and compares them.

``torchx run -s local_cwd --workspace "" dist.ddp -j 1x2 -m examples.two_tower.train`` starts it on
two ranks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from examples.process import run_main, start
from examples.two_tower import report
from examples.two_tower.config import TwoTowerConfig, parse_args
from examples.two_tower.loop import Result, num_steps, popular, run
from examples.two_tower.model import check_budgets
from examples.two_tower.purchases import DESCRIPTION, prepare_purchases


def train(config: TwoTowerConfig) -> list[Result]:
    """Train every kind, compression and seed in turn, and write the report.

    Args:
        config: options of the run.

    Raises:
        ValueError: for options that cannot be used.
        OSError: if a file cannot be read or written.
    """
    data = prepare_purchases(Path(config.cache_dir))
    check_budgets(config, data.sizes)
    start()
    world_size = dist.get_world_size()
    places = data.train(None if config.full else config.sample)
    steps = num_steps(config, len(places), world_size)
    sizes = {
        "train": min(len(places), steps * config.batch_size * world_size),
        "test": len(data.test(config.queries)),
    }
    if dist.get_rank() == 0:
        print(json.dumps(dataclasses.asdict(config)))
        print(
            f"{DESCRIPTION}\n{sizes['train']:,} to train on and {sizes['test']:,} later ones to "
            f"look for, on {world_size} ranks",
            flush=True,
        )
    results = [popular(config, data)]
    for seed in config.seed:
        for kind in config.table_kind:
            for compression in (1.0,) if kind == "full" else config.compression:
                results.append(run(config, data, kind, compression, seed))
    if dist.get_rank() == 0:
        print(f"\n{report.save(config, results, sizes)}\n\nreport: {config.out}/report.md")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line on standard error and exit status 2.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
    """
    return run_main(lambda: train(parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
