"""Tests what ``examples.dlrm.train`` has trained and saved, with the same flags; trains nothing.

``python -m examples.dlrm.evaluate --checkpoint_dir DIR`` does it on one rank; a checkpoint loads on
any number of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch.distributed as dist

from examples.dlrm import report
from examples.dlrm.config import TrainConfig, parse_args
from examples.dlrm.loop import Result, Training, cases
from examples.dlrm.train import begin
from examples.process import run_main


def evaluate(config: TrainConfig) -> list[Result]:
    """Test every kind, compression and seed in turn, and write ``evaluation.json``.

    Args:
        config: options of the training, ``checkpoint_dir`` among them.

    Returns:
        What :func:`examples.dlrm.train.train` returned, to the last bit on as many ranks.

    Raises:
        ValueError: for options or data that cannot be used, and checkpoints of other tables.
        OSError: if a file cannot be read or written, or there is no checkpoint.
    """
    if not config.checkpoint_dir:
        raise ValueError("--checkpoint_dir must be given: the folder that the training saved to")
    log = begin(config)
    results = []
    for case in cases(config):
        training = Training(config, log, case)
        training.restore()
        results.append(training.test())
    if dist.get_rank() == 0:
        print(f"\n{report.save_evaluation(config, log, results)}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one line on standard error and exit status 2.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
    """
    return run_main(
        lambda: evaluate(
            parse_args(
                arguments,
                program="examples.dlrm.evaluate",
                description="Test what examples.dlrm.train has saved in --checkpoint_dir.",
            )
        )
    )


if __name__ == "__main__":
    sys.exit(main())
