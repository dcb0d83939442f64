"""A sharded model that can be set back to what it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import torchrec_cafe as tc
from tests.distributed import models
from tests.fuzz.batches import FEATURES, KEYS, SIZES, Batch
from torchrec_cafe.distributed.embedding_bag import ShardedCompressedEmbeddingBagCollection
from torchrec_cafe.ops import COUNTERS

DIM = 8
CAFE = tc.Cafe(compression=3, num_shards=4, rebalance_interval=2, half_life=50, medium_fraction=0.0)
OWN = "t_own"


@dataclasses.dataclass(frozen=True)
class Setup:
    """How the tables of a model are kept."""

    kind: Any
    sharding_type: str = "row_wise"
    pooling: PoolingType = PoolingType.SUM
    weighted: bool = False
    precision: DataType = DataType.FP32
    mode: BoundsCheckMode = BoundsCheckMode.WARNING
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD


def collection(setup: Setup) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=size,
                embedding_dim=DIM,
                feature_names=[key for key in KEYS if FEATURES[key] == name],
                pooling=setup.pooling,
                data_type=setup.precision,
            )
            for name, size in SIZES.items()
        ],
        is_weighted=setup.weighted,
        device=torch.device("meta"),
    )


def build(setup: Setup) -> DistributedModelParallel:
    kinds = setup.kind if isinstance(setup.kind, dict) else dict.fromkeys(SIZES, setup.kind)
    constraints = {
        name: tc.ParameterConstraints(
            table=kinds[name],
            sharding_types=[setup.sharding_type],
            bounds_check_mode=setup.mode,
        )
        for name in SIZES
        if name != OWN
    }
    constraints[OWN] = tc.ParameterConstraints(
        sharding_types=["table_wise"], bounds_check_mode=BoundsCheckMode.IGNORE
    )
    torch.manual_seed(7)
    return models.sharded(collection(setup), constraints, setup.optimizer)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, NaNs too."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [part.detach().contiguous().view(-1).view(torch.uint8) for part in (one, other)]
    return torch.equal(*bits)


class Bed:
    """A model that has learned something, and its state then.

    Args:
        setup: of the model.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = build(setup)
        (self.module,) = (
            module
            for module in self.model.modules()
            if isinstance(module, ShardedCompressedEmbeddingBagCollection)
        )
        self.ours = [*self.module.compressed_kernels(), *self.module.lookahead_kernels()]
        generator = torch.Generator().manual_seed(3)
        for _ in range(8):
            bags = [
                (torch.rand(2, generator=generator) ** 3 * SIZES[FEATURES[key]]).long().tolist()
                for key in KEYS
                for _ in range(6)
            ]
            weights = [1.0] * (2 * len(bags)) if setup.weighted else None
            self.step(Batch(bags, 6, weights))
        self.base = self.snapshot()

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, not copied; the rows and the sketch are up to date."""
        result: dict[str, Tensor] = {}
        for number, kernel in enumerate(self.ours):
            kernel.flush()
            parts = dict(enumerate(kernel.emb_module.presented_tensors()))
            if hasattr(kernel.bags, "state") and kernel.bags.state is not None:
                parts |= kernel.bags.state.state_tensors()
            result |= {f"{number} {name}": tensor for name, tensor in parts.items()}
        for lookup in self.module._lookups:
            for kernel in lookup._emb_modules:
                if kernel in self.ours:
                    continue
                tbe = kernel.emb_module
                states = [state for of_table in tbe.split_optimizer_states() for state in of_table]
                parts = [*tbe.split_embedding_weights(), *states]
                result |= {f"own {number}": tensor for number, tensor in enumerate(parts)}
        return result

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def reset(self) -> None:
        """Go back to what it was when it was made."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(self.base[name])
        for kernel in self.ours:
            kernel.purge()

    def changed(self, since: dict[str, Tensor]) -> list[str]:
        """The names of what is not what it was."""
        now = self.tensors()
        assert now.keys() == since.keys()
        return [name for name, tensor in now.items() if not same_bits(tensor, since[name])]

    def look_up(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.model(batch.tensor()).values()

    def step(self, batch: Batch, grad: Tensor | None = None) -> Tensor:
        """Look up, and train."""
        pooled = self.model(batch.tensor()).values()
        pooled.backward(gradient(pooled) if grad is None else grad)
        return pooled.detach()

    def check_sketch(self) -> None:
        """The sketch is finite, and hot rows and their owners know each other."""
        for pool in models.pools(self.model):
            state = pool.sketch
            assert state.scores.isfinite().all()
            assert (state.scores >= 0).all()
            assert state.inflation.isfinite().all()
            assert pool.state_tensors()["sketch_norms"].isfinite().all()
            rows = state.hot_rows.flatten(1)
            for shard in range(len(rows)):
                owners = state.owners[shard]
                owned = (owners >= 0).nonzero().squeeze(1)
                assert torch.equal(rows[shard][owners[owned].long()].long(), owned)
                assert int((rows[shard] >= 0).sum()) == len(owned)

    def non_finite(self) -> int:
        at = COUNTERS.index("non_finite")
        return sum(int(pool.sketch.counters[:, at].sum()) for pool in models.pools(self.model))


def gradient(pooled: Tensor) -> Tensor:
    """A gradient of each element's own."""
    size = torch.arange(pooled.numel()) % 13 - 6
    return (size * 0.01).view_as(pooled).to(pooled.dtype)
