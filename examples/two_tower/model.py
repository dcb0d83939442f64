"""The model: two towers, a product's vector and a query's, trained to point the same way.

Shape legend: ``B`` purchases, ``L`` products of a history, ``D`` columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import JaggedTensor

import torchrec_cafe as tc
from examples.two_tower.batches import BAGS, SEQUENCES, Batch
from examples.two_tower.config import TwoTowerConfig
from torchrec_cafe.config import TableShape

_META = torch.device("meta")


@torch.fx.wrap
def attend(history: JaggedTensor, query: Tensor, longest: int) -> Tensor:
    """The mean of a history's vectors, weighted by how well they fit a query.

    Args:
        history: of ``B`` purchases, each of up to ``longest`` vectors.
        query: ``[B, D]``.
        longest: L.

    Returns:
        ``[B, D]``; 0 without history.
    """
    vectors = history.to_padded_dense(longest)  # [B, L, D]
    places = torch.arange(longest, device=query.device)
    absent = places >= history.lengths().unsqueeze(1)
    fit = (vectors * query.unsqueeze(1)).sum(2) / query.shape[1] ** 0.5
    # A softmax of nothing but -inf is NaN: where there is no history, all is multiplied by 0.
    weights = fit.masked_fill(absent, -1e9).softmax(1).masked_fill(absent, 0.0)
    return (weights.unsqueeze(2) * vectors).sum(1)


@torch.fx.wrap
def in_batch_softmax(
    queries: Tensor, candidates: Tensor, batch: Batch, temperature: float
) -> Tensor:
    """Cross entropy of finding each purchase's product among those of the batch.

    Products that are bought often are in many batches: their share is taken off.

    Args:
        queries: ``[B, D]``.
        candidates: ``[B, D]``.
        batch: says which candidates are the same product.
        temperature: of the softmax.
    """
    scores = queries @ candidates.t() / temperature - batch.log_share
    same = batch.products == batch.products.unsqueeze(1)
    same.fill_diagonal_(fill_value=False)
    labels = torch.arange(len(queries), device=queries.device)
    return nn.functional.cross_entropy(scores.masked_fill(same, -torch.inf), labels)


class TwoTower(nn.Module):
    """Scores products for households; tables on the meta device.

    Args:
        config: options of the run.
        sizes: ids of each table.
    """

    def __init__(self, config: TwoTowerConfig, sizes: dict[str, int]) -> None:
        """Build the towers; see the class."""
        super().__init__()
        dim = config.embedding_dim
        self.sequences = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="t_product",
                    num_embeddings=sizes["product"],
                    embedding_dim=dim,
                    feature_names=list(SEQUENCES),
                )
            ],
            device=_META,
        )
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t_{name}",
                    num_embeddings=sizes[name],
                    embedding_dim=dim,
                    feature_names=[name],
                )
                for name in BAGS
            ],
            device=_META,
        )
        self.ask = nn.Linear(dim, dim)
        self.query = _tower(2 * dim, config.hidden, dim)
        self.candidate = _tower(len(BAGS) * dim, config.hidden, dim)
        self._longest = config.history
        self._temperature = config.temperature

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Loss of a batch; then loss, queries ``[B, D]`` and candidates ``[B, D]`` to look at."""
        found = self.sequences(batch.sequences)
        bags = self.bags(batch.bags)
        user = bags["user"]
        past = attend(found["history"], self.ask(user), self._longest)
        queries = nn.functional.normalize(self.query(torch.cat([user, past], 1)), dim=1)
        attributes = [bags[name] for name in BAGS[1:]]
        product = torch.cat([found["candidate"].values(), *attributes], 1)
        candidates = nn.functional.normalize(self.candidate(product), dim=1)
        loss = in_batch_softmax(queries, candidates, batch, self._temperature)
        return loss, (loss.detach(), queries.detach(), candidates.detach())


def _tower(width: int, hidden: int, dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def check_budgets(config: TwoTowerConfig, sizes: dict[str, int]) -> None:
    """Refuse a compression that leaves no row, before anything is trained.

    Args:
        config: options of the run.
        sizes: ids of each table.

    Raises:
        ValueError: naming the largest compression that works.
    """
    for names in (("product",), BAGS):
        shapes = [
            TableShape(
                name=f"t_{name}", num_embeddings=sizes[name], embedding_dim=config.embedding_dim
            )
            for name in names
        ]
        for kind in config.table_kind:
            for compression in config.compression:
                table = config.table(kind, compression)
                if table is not None:
                    table.allocate(shapes)


def shard(
    config: TwoTowerConfig, sizes: dict[str, int], table: Any, device: torch.device
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Plan, shard, and give the towers their optimizer.

    Args:
        config: options of the run.
        sizes: ids of each table.
        table: how tables are kept; ``None``: as TorchRec's own.
        device: CPU or this rank's GPU.
    """
    model = TwoTower(config, sizes)
    # Table-wise keeps every stock table's optimizer fused, as the compressed ones' is.
    constraint = tc.ParameterConstraints(
        table=table, sharding_types=["table_wise"] if table is None else None
    )
    planner = tc.EmbeddingShardingPlanner(
        topology=Topology(
            world_size=dist.get_world_size(), compute_device=device.type, ddr_cap=64 * 2**30
        ),
        constraints={f"t_{name}": constraint for name in ("product", *BAGS)},
        batch_size=config.batch_size,
        storage_reservation=FixedPercentageStorageReservation(0.1),
        stats=NoopEmbeddingStats(),
        debug=False,
    )
    fused_params: dict[str, Any] = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": config.learning_rate,
    }
    sharders: list[Any] = [
        tc.EmbeddingCollectionSharder(fused_params=fused_params),
        tc.EmbeddingBagCollectionSharder(fused_params=fused_params),
    ]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, plan=plan, sharders=sharders, device=device)
    towers = ("ask", "query", "candidate")
    dense = KeyedOptimizerWrapper(
        {n: p for n, p in sharded.named_parameters() if n.split(".")[0] in towers},
        lambda parameters: torch.optim.Adam(parameters, lr=config.dense_learning_rate),
    )
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])
