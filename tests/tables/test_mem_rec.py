"""MEM-REC bags against a dense model in plain PyTorch, in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import Tensor

from torchrec_cafe.config import MemRec
from torchrec_cafe.ops import reference
from torchrec_cafe.tables import (
    CompressedBags,
    MemRecLayout,
    MemRecRows,
    MemRecSamples,
    RowRangeTBE,
    TableLayout,
    sample_vectors,
)

DIM, SHARDS, ROWS, WEIGHTS = 8, 4, 10, 12
SIZES = (40, 7)
CPU = torch.device("cpu")


def make(
    optimizer: EmbOptimType, precision: SparseType = SparseType.FP32, **options: Any
) -> CompressedBags:
    kind = MemRec(num_token_rows=SHARDS * ROWS, num_shards=SHARDS, **options)
    layout = MemRecLayout(
        kind=kind,
        first_shard=0,
        shards_held=SHARDS,
        token_rows_per_shard=ROWS,
        weights_per_shard=WEIGHTS,
    )
    fused_params = {"optimizer": optimizer, "learning_rate": 0.5, "eps": 1e-8}
    tbe = RowRangeTBE(
        [0, 0, SHARDS * ROWS],
        DIM,
        weights_precision=precision,
        device=CPU,
        fused_params=fused_params,
    )
    tables = [
        TableLayout(
            name=f"t_{index}",
            num_ids=size,
            shared_rows=SHARDS,
            first_row=0,
            num_rows=0,
            num_features=1,
            index=index,
        )
        for index, size in enumerate(SIZES)
    ]
    generator = torch.Generator().manual_seed(0)
    weights = tbe.physical_tensors()[0]
    weights.copy_(torch.randn(weights.shape, generator=generator))
    lookup = MemRecSamples if kind.per == "sample" else MemRecRows
    bags = CompressedBags(lookup(tables, layout, tbe, fused_params), tbe)
    assert bags.state is not None
    table = bags.state.state_tensors()["weight_table"]
    tokens = len(SIZES) if kind.per == "sample" else 1
    assert (table == 1 / (tokens * kind.num_weight_hashes)).all()
    table.copy_(torch.randn(table.shape, generator=generator))
    return bags


def tensors(bags: CompressedBags) -> tuple[Tensor, Tensor]:
    """Token rows and weights, not copied."""
    assert bags.state is not None
    return bags.tbe.physical_tensors()[0], bags.state.state_tensors()["weight_table"]


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Ids and offsets of a batch of six samples, with empty bags and ids that repeat."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (12,), generator=generator)
    ids = [
        torch.randint(0, SIZES[bag // 6], (int(n),), generator=generator)
        for bag, n in enumerate(lengths)
    ]
    return torch.cat(ids), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def dense(
    bags: CompressedBags, rows: Tensor, weights: Tensor, batch: tuple[Tensor, Tensor], user: Tensor
) -> Tensor:
    """z = alpha * M phi of each id, by the definitions, summed by bag: ``[B, F * D]``."""
    lookup = bags.rows
    assert isinstance(lookup, MemRecRows)
    ids, offsets = batch
    tables, layout = lookup._tables, lookup._layout
    alpha = reference.bloom_weigh(weights, ids, offsets, tables, layout.weight_bits) * user
    pooled = []
    for bag in range(12):
        table = tables[bag // 6].tolist()
        total = rows.new_zeros(DIM)
        for i in range(int(offsets[bag]), int(offsets[bag + 1])):
            phi = rows.new_zeros(len(rows))
            phi[reference.bloom_bits(int(ids[i]), table, layout.token_bits, 0)] = 1
            total = total + alpha[i] * (phi @ rows)
        pooled.append(total)
    return torch.stack(pooled).view(2, 6, DIM).transpose(0, 1).reshape(6, 2 * DIM)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num_hashes", "num_weight_hashes"), [(1, 4), (3, 2), (1, 1)])
def test_values_and_gradients_are_those_of_the_dense_model(
    num_hashes: int, num_weight_hashes: int, weighted: bool
):
    bags = make(EmbOptimType.EXACT_SGD, num_hashes=num_hashes, num_weight_hashes=num_weight_hashes)
    for seed in range(5):
        batch = draw(seed)
        generator = torch.Generator().manual_seed(seed)
        user = torch.rand(len(batch[0]), generator=generator)
        rows, weights = (tensor.double().requires_grad_() for tensor in tensors(bags))
        expected = dense(bags, rows, weights, batch, user.double() if weighted else torch.ones(1))
        pooled = bags(*batch, user if weighted else None)
        torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-5)
        pull = torch.randn(expected.shape, generator=generator)
        (expected * pull.double()).sum().backward()
        (pooled * pull).sum().backward()
        # The optimizer has stepped, by the learning rate times the gradient.
        for before, now in zip((rows, weights), tensors(bags), strict=True):
            assert before.grad is not None
            stepped = before.detach() - 0.5 * before.grad
            torch.testing.assert_close(now.double(), stepped, rtol=1e-5, atol=1e-5)


def test_per_sample_weights_get_their_gradient():
    bags = make(EmbOptimType.EXACT_SGD, num_hashes=2)
    batch = draw(3)
    user = torch.rand(len(batch[0]), dtype=torch.float64, requires_grad=True)
    rows, weights = (tensor.double() for tensor in tensors(bags))
    dense(bags, rows, weights, batch, user).pow(2).sum().backward()
    given = user.detach().float().requires_grad_()
    bags(*batch, given).pow(2).sum().backward()
    assert given.grad is not None
    assert user.grad is not None
    torch.testing.assert_close(given.grad.double(), user.grad, rtol=1e-4, atol=1e-4)


def test_the_definition_passes_gradcheck():
    bags = make(EmbOptimType.EXACT_SGD, num_hashes=2, num_weight_hashes=3)
    rows, weights = (tensor.double().requires_grad_() for tensor in tensors(bags))
    batch = draw(3)
    user = torch.rand(len(batch[0]), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows, weights, user: dense(bags, rows, weights, batch, user), (rows, weights, user)
    )


def test_adagrad_steps_as_torchs_does():
    bags = make(EmbOptimType.EXACT_ADAGRAD, num_hashes=2, num_weight_hashes=3)
    rows, weights = (tensor.double().requires_grad_() for tensor in tensors(bags))
    optimizer = torch.optim.Adagrad([rows, weights], lr=0.5, eps=1e-8)
    for seed in range(8):
        batch = draw(seed)
        optimizer.zero_grad()
        dense(bags, rows, weights, batch, torch.ones(1)).pow(2).sum().backward()
        bags(*batch).pow(2).sum().backward()
        optimizer.step()
        for expected, now in zip((rows, weights), tensors(bags), strict=True):
            torch.testing.assert_close(now.double(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_the_weights_follow_the_learning_rate():
    bags = make(EmbOptimType.EXACT_SGD)
    bags.tbe.set_learning_rate(0.0)
    before = [tensor.clone() for tensor in tensors(bags)]
    bags(*draw(0)).sum().backward()
    for tensor, now in zip(before, tensors(bags), strict=True):
        assert torch.equal(tensor, now)


def test_evaluation_gives_the_values_of_training():
    bags = make(EmbOptimType.EXACT_ROWWISE_ADAGRAD, num_hashes=2)
    trained = bags(*draw(1))
    bags.eval()
    assert torch.equal(bags(*draw(1)), trained)
    with torch.no_grad():
        quiet = bags(*draw(1))
        weights = torch.rand(len(draw(1)[0]))
        weighted = bags(*draw(1), weights)
    torch.testing.assert_close(quiet, trained)  # in one pass, in another order
    assert not quiet.requires_grad
    torch.testing.assert_close(weighted, bags(*draw(1), weights))


def test_half_precision_rows_have_weights_in_single():
    bags = make(EmbOptimType.EXACT_ROWWISE_ADAGRAD, SparseType.FP16)
    rows, weights = tensors(bags)
    assert (rows.dtype, weights.dtype) == (torch.float16, torch.float32)
    batch = draw(2)
    expected = dense(bags, rows.double(), weights.double(), batch, torch.ones(1))
    pooled = bags(*batch)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-3, atol=1e-3)
    pooled.sum().backward()


def test_empty_batches_train_nothing():
    bags = make(EmbOptimType.EXACT_SGD, num_hashes=2)
    before = [tensor.clone() for tensor in tensors(bags)]
    pooled = bags(torch.empty(0, dtype=torch.int64), torch.zeros(13, dtype=torch.int64))
    assert not pooled.any()
    pooled.sum().backward()
    for tensor, now in zip(before, tensors(bags), strict=True):
        assert torch.equal(tensor, now)


def dense_samples(
    bags: CompressedBags, rows: Tensor, weights: Tensor, batch: tuple[Tensor, Tensor]
) -> Tensor:
    """z = alpha * M phi of each sample, by the definitions: ``[B, D]``."""
    lookup = bags.rows
    assert isinstance(lookup, MemRecSamples)
    tables, layout = lookup._tables, lookup._layout
    phi = reference.bloom_union(*batch, tables, layout.token_bits, of="rows")
    psi = reference.bloom_union(*batch, tables, layout.weight_bits, of="weights")
    vectors = []
    for sample in range(6):
        of_rows = phi.bits[phi.offsets[sample] : phi.offsets[sample + 1]]
        of_weights = psi.bits[psi.offsets[sample] : psi.offsets[sample + 1]]
        vectors.append(weights.view(-1)[of_weights].sum() * rows[of_rows].sum(0))
    return torch.stack(vectors)


def vectors(bags: CompressedBags, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What becomes of rows and factors once all ranks' are added."""
    both = sample_vectors(bags(*batch), 2)
    assert torch.equal(both[:, :DIM], both[:, DIM:])
    return both[:, :DIM]


@pytest.mark.parametrize(("num_hashes", "num_weight_hashes"), [(1, 4), (3, 2)])
def test_vectors_of_samples_are_those_of_the_dense_model(num_hashes: int, num_weight_hashes: int):
    bags = make(
        EmbOptimType.EXACT_ADAGRAD,
        per="sample",
        num_hashes=num_hashes,
        num_weight_hashes=num_weight_hashes,
    )
    rows, weights = (tensor.double().requires_grad_() for tensor in tensors(bags))
    optimizer = torch.optim.Adagrad([rows, weights], lr=0.5, eps=1e-8)
    for seed in range(6):
        batch = draw(seed)
        with torch.no_grad():
            quiet = vectors(bags, batch)
        expected, got = dense_samples(bags, rows, weights, batch), vectors(bags, batch)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(quiet, got)
        assert not quiet.requires_grad
        optimizer.zero_grad()
        pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed))
        (expected * pull.double()).sum().backward()
        (got * pull).sum().backward()
        optimizer.step()
        for stepped, now in zip((rows, weights), tensors(bags), strict=True):
            torch.testing.assert_close(now.double(), stepped.detach(), rtol=1e-4, atol=1e-4)


def test_samples_without_ids_have_no_vector():
    bags = make(EmbOptimType.EXACT_SGD, per="sample")
    before = [tensor.clone() for tensor in tensors(bags)]
    pooled = bags(torch.empty(0, dtype=torch.int64), torch.zeros(13, dtype=torch.int64))
    assert pooled.shape == (6, DIM + 1)
    assert not pooled.any()
    pooled.sum().backward()
    for tensor, now in zip(before, tensors(bags), strict=True):
        assert torch.equal(tensor, now)
    with pytest.raises(ValueError, match="takes no weighted features"):
        bags(*draw(0), torch.ones(len(draw(0)[0])))
