"""Trains a DLRM with compressed tables, exports it, trains on, and exports what has changed.

``torchrun --standalone --nproc_per_node 2 -m examples.serving.export`` does it on two ranks;
:mod:`examples.serving.serve` then serves what it has written.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

import torchrec_cafe as tc
from examples.clicks import click_log
from examples.dlrm.data.click_log import BatchLoader, Split
from examples.existing_pipeline.after import build_model, shard
from examples.process import quieten

#: samples that predictions are compared on
NUM_TEST = 20_000
#: how rows are kept: exact, and as served
DTYPES = {"float32": torch.float32, "int8": torch.int8}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/serving"))
    parser.add_argument("--steps", type=int, default=400, help="before the export")
    parser.add_argument("--more_steps", type=int, default=40, help="after it, for the delta")
    parser.add_argument("--batch_size", type=int, default=256, help="per rank")
    parser.add_argument("--compression", type=float, default=20)
    return parser.parse_args(arguments)


def _train(model: Any, optimizer: Any, batches: Iterator[Batch], steps: int) -> None:
    model.train()
    pipeline = TrainPipelineSparseDist(model, optimizer, model.device)
    batches = itertools.islice(batches, steps)
    for _ in range(steps):
        pipeline.progress(batches)
    pipeline.detach()


@torch.no_grad()
def _predictions(model: DistributedModelParallel, split: Split, features: Any) -> Tensor:
    """Of the trained model, float32 ``[n]``; every rank looks up the same samples."""
    model.eval()
    loader = BatchLoader(split, features, batch_size=4096, drop_last=False)
    return torch.cat([model(batch.to(model.device))[1][1].cpu().sigmoid() for batch in loader])


def export(options: argparse.Namespace) -> None:
    """Train and write everything; every rank calls it.

    Args:
        options: of :func:`parse_args`.
    """
    torch.manual_seed(0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    steps = options.steps + options.more_steps
    log = click_log(steps * options.batch_size * world_size, NUM_TEST)
    model, optimizer = shard(build_model(log.num_dense), options, torch.device("cpu"))
    tracker = tc.DeltaTracker(model)
    batches = iter(
        BatchLoader(
            log.train,
            log.features,
            batch_size=options.batch_size,
            rank=rank,
            world_size=world_size,
            drop_last=True,
        )
    )
    _train(model, optimizer, batches, options.steps)
    served = {
        name: tracker.to_inference(build_model(log.num_dense), dtype=dtype)
        for name, dtype in DTYPES.items()
    }
    trained = [_predictions(model, log.test, log.features)]
    _train(model, optimizer, batches, options.more_steps)
    delta = tracker.delta(since=1)
    trained.append(_predictions(model, log.test, log.features))
    if rank > 0:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name, module in served.items():
        torch.save(module, options.out / f"{name}.pt")
    torch.save(delta, options.out / "delta.pt")
    torch.save(
        {
            "keys": [feature.name for feature in log.features],
            "dense": torch.from_numpy(log.test.dense),
            "ids": torch.from_numpy(log.test.ids.astype("int64")),
            "labels": torch.from_numpy(log.test.labels),
            "trained": torch.stack(trained),
        },
        options.out / "requests.pt",
    )
    print(f"exported to {options.out}", flush=True)


def main() -> None:
    """Run one rank."""
    quieten()
    dist.init_process_group("gloo")
    export(parse_args())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
