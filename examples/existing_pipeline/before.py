"""A DLRM, two of whose tables are large."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from examples.clicks import FEATURES, click_log
from examples.dlrm.data.click_log import BatchLoader

LARGE = ("t_user", "t_item")
SHARDING = ["row_wise", "table_wise"]  # of the large tables, as far as the device has them


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=256, help="per rank")
    parser.add_argument("--checkpoint", default="", help="folder to go on from, and to save to")
    return parser.parse_args(arguments)


def build_model(num_dense: int) -> DLRMTrain:
    """The model, its tables on the meta device."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}", feature_names=[name], num_embeddings=size, embedding_dim=16
        )
        for name, size in FEATURES
    ]
    collection = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    return DLRMTrain(DLRM(collection, num_dense, [64, 16], [64, 1]))


def shard(
    model: DLRMTrain, options: argparse.Namespace, device: torch.device
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Plan, shard, and give the dense layers their optimizer."""
    constraints = {name: ParameterConstraints(sharding_types=SHARDING) for name in LARGE}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type),
        batch_size=options.batch_size,
        constraints=constraints,
    )
    fused_params = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
    sharders: list[Any] = [EmbeddingBagCollectionSharder(fused_params=fused_params)]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, plan=plan, sharders=sharders, device=device)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=0.003),
    )
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])


def train(options: argparse.Namespace) -> list[float]:
    """Train, and return the mean loss of each step."""
    torch.manual_seed(0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = click_log(options.steps * options.batch_size * world_size)
    model, optimizer = shard(build_model(log.num_dense), options, device)
    optimizer.init_state()
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if Path(options.checkpoint, ".metadata").is_file():
        dcp.load(state, checkpoint_id=options.checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    loader = BatchLoader(
        log.train,
        log.features,
        batch_size=options.batch_size,
        rank=rank,
        world_size=world_size,
        drop_last=True,
    )
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    batches, losses = iter(loader), []
    for step in range(options.steps):
        loss, *_ = pipeline.progress(batches)
        dist.all_reduce(loss := loss.detach())
        losses.append(float(loss) / world_size)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.9g}", flush=True)
    if options.checkpoint:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.save(state, checkpoint_id=options.checkpoint)
    return losses


def main() -> None:
    """Run one rank."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    train(parse_args())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
