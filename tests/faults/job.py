"""A training that saves itself every few steps, and goes on from there when it is started anew.

Started by TorchX or torchrun, which restart its ranks when one dies. What it leaves in its folder:
``ranks/`` with the process of each rank, ``progress`` with a line per step, ``sums/`` with a
checksum of all tensors at each save, ``losses``, and ``end.json`` when it is through.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import torchrec_cafe as tc
from tests.distributed import checkpoint_tasks as tasks

#: A rank that waits longer than this for others gives up.
TIMEOUT = timedelta(seconds=60)


def checksum(state: dict[str, Any]) -> str:
    """Of every tensor of a model and its optimizer, all rows of all ranks."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tasks.whole_state(**state).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _append(path: Path, line: str) -> None:
    if dist.get_rank() == 0:
        with path.open("a") as file:
            file.write(line + "\n")


def train(folder: Path, steps: int, save_every: int) -> None:
    """Train, from the last complete checkpoint on.

    Args:
        folder: where everything lies.
        steps: to train in all.
        save_every: steps between two saves.
    """
    model, optimizer = tasks.build("row_wise")
    optimizer.init_state()
    state = {"model": model, "optimizer": optimizer}
    manager = tc.CheckpointManager(folder / "checkpoints", timeout=TIMEOUT)
    begin = manager.latest() or 0
    if begin:
        manager.load(state)
        found, saved = checksum(state), (folder / "sums" / str(begin)).read_text()
        if found != saved:
            raise AssertionError(f"step {begin}: a row was lost, {found} instead of {saved}")
    _append(folder / "progress", f"{time.time()} start {begin}")
    pipeline = tc.LookaheadTrainPipeline(model, optimizer, model.device, depth=3)
    data = tasks.batches(steps, skip=begin)
    model.train()
    for step in range(begin, steps):
        if step > begin and step % save_every == 0:
            found = checksum(state)
            if dist.get_rank() == 0:
                (folder / "sums" / str(step)).write_text(found)
            manager.async_save(state, step)
        pipeline.progress(data)
        _append(folder / "progress", f"{time.time()} step {step}")
    manager.wait()
    found = checksum(state)
    if dist.get_rank() == 0:
        (folder / "end.json").write_text(json.dumps({"steps": steps, "checksum": found}))


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    options = parser.parse_args()
    for name in ("ranks", "sums"):
        (options.folder / name).mkdir(parents=True, exist_ok=True)
    (options.folder / "ranks" / os.environ["RANK"]).write_text(str(os.getpid()))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    train(options.folder, options.steps, options.save_every)
    dist.barrier()
    sys.stdout.flush()
    # gloo's teardown may abort after all is done, and turn success into failure.
    os._exit(0)


if __name__ == "__main__":
    main()
