"""How long training stands still for a checkpoint.

``python -m benchmarks.checkpoints`` shards, on one rank, three tables of equal resident bytes: one
of TorchRec's, one of :class:`torchrec_cafe.Cafe`, one of :class:`torchrec_cafe.Lookahead` in host
memory. Rounds of copying every tensor of the state (``clone``), of
:meth:`torchrec_cafe.CheckpointManager.async_save` (the call is what training waits for) and of
:meth:`~torchrec_cafe.CheckpointManager.save` take turns; each has first trained some batches, so
that there are rows to write back. Steps are timed besides, alone and while a save goes on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

import torchrec_cafe as tc
from benchmarks.common import Row, print_rows, write_json, zipf_ids
from examples.dlrm.memory import keep_freed_pages
from examples.process import quieten

DIM = 64
BATCH = 4096
COMPRESSION = 50
KINDS: dict[str, Any] = {
    "own": None,
    "cafe": tc.Cafe(compression=COMPRESSION),
    "lookahead": tc.Lookahead(cache_fraction=0.1),
}


class Training:
    """A sharded collection and its batches.

    Args:
        table_bytes: resident bytes of each table.
    """

    def __init__(self, table_bytes: int) -> None:
        """Plan and shard; see the class."""
        rows = table_bytes // (4 * DIM)
        self._sizes = {name: rows * (COMPRESSION if name == "cafe" else 1) for name in KINDS}
        module = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t_{name}",
                    num_embeddings=size,
                    embedding_dim=DIM,
                    feature_names=[name],
                )
                for name, size in self._sizes.items()
            ],
            device=torch.device("meta"),
        )
        optimizer = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}
        sharders: list[Any] = [tc.EmbeddingBagCollectionSharder(fused_params=optimizer)]
        planner = tc.EmbeddingShardingPlanner(
            topology=Topology(world_size=1, compute_device="cpu", ddr_cap=2**40),
            constraints={
                f"t_{name}": tc.ParameterConstraints(table=kind, sharding_types=["table_wise"])
                for name, kind in KINDS.items()
            },
            storage_reservation=FixedPercentageStorageReservation(0.1),
            stats=NoopEmbeddingStats(),
            debug=False,
        )
        plan = planner.collective_plan(module, sharders, dist.group.WORLD)
        self._model = DistributedModelParallel(
            module, plan=plan, sharders=sharders, device=torch.device("cpu")
        )
        self._batches = [self._draw(seed) for seed in range(8)]
        self._step = 0

    def _draw(self, seed: int) -> KeyedJaggedTensor:
        parts = [zipf_ids(size, BATCH, 1.05, seed) for size in self._sizes.values()]
        return KeyedJaggedTensor(
            keys=list(self._sizes),
            values=torch.cat(parts),
            lengths=torch.ones(len(parts) * BATCH, dtype=torch.int64),
            stride=BATCH,
        )

    @property
    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self._model, "optimizer": self._model.fused_optimizer}

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self._step += 1
        self._model(self._batches[self._step % len(self._batches)]).values().sum().backward()
        return time.perf_counter() - start

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state, not copied."""
        states = self.state["optimizer"].state_dict()["state"].values()
        values = [*self._model.state_dict().values(), *(t for s in states for t in s.values())]
        return [
            shard.tensor
            for value in values
            if hasattr(value, "local_shards")
            for shard in value.local_shards()
        ]


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def measure(training: Training, folder: Path, rounds: int) -> list[Row]:
    """The figures.

    Args:
        training: what is saved.
        folder: where.
        rounds: of each.
    """
    manager = tc.CheckpointManager(folder, keep=1)
    found: dict[str, list[float]] = {
        name: [] for name in ("copy", "call", "save", "alone", "beside")
    }
    for step in tqdm(range(rounds), desc="rounds", unit=""):
        found["alone"] += [training.step() for _ in range(8)]
        found["copy"].append(_seconds(_copies, training.tensors()))
        found["alone"] += [training.step() for _ in range(8)]
        found["call"].append(_seconds(manager.async_save, training.state, 2 * step))
        found["beside"] += [training.step() for _ in range(8)]
        manager.wait()
        found["save"].append(_seconds(manager.save, training.state, 2 * step + 1))
    seconds = {name: statistics.median(values) for name, values in found.items()}
    size = sum(t.numel() * t.element_size() for t in training.tensors())
    return [
        Row("state", size / 2**20, "MiB"),
        Row("copying it", seconds["copy"], "s"),
        Row("training stands still for async_save", seconds["call"], "s", seconds["copy"]),
        Row("copy / standing still", seconds["copy"] / seconds["call"], "", None, 0.8),
        Row("save", seconds["save"], "s", seconds["copy"]),
        Row("step while a save goes on / alone", seconds["beside"] / seconds["alone"], ""),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables, few rounds")
    parser.add_argument("--json", default="", help="file for the figures")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    options = parser.parse_args(arguments)
    quieten()
    keep_freed_pages()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cafe-benchmark-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        training = Training((64 if options.quick else 512) * 2**20)
        rows = measure(training, Path(folder) / "checkpoints", 3 if options.quick else 9)
        dist.destroy_process_group()
    print_rows(rows)
    write_json(options.json, "checkpoints", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
