"""Bloom encodings, and the weights of MEM-REC."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from torchrec_cafe.ops.bloom import FIRST_PAIR, WEIGHTS_PER_ROW, BitsOfSamples, BloomBits
from torchrec_cafe.ops.pool_rows import Lookups
from torchrec_cafe.ops.reference.cafe import hash64

TOKEN_PAIRS, WEIGHT_PAIRS = FIRST_PAIR["rows"], FIRST_PAIR["weights"]


def bloom_bits(id_: int, table: list[int], bits: BloomBits, first_pair: int) -> list[int]:
    """The bits that a local id sets, each once, in the order of the hash functions."""
    num_ids, num_shards, first_id, _, index = table
    mixed_id = first_id + id_
    shard = mixed_id * num_shards // num_ids - bits.first_shard
    held = min(max(shard, 0), bits.shards_held - 1)
    return bits_of_key(index << 48 | mixed_id, held, bits, first_pair)


def bits_of_key(key: int, shard: int, bits: BloomBits, first_pair: int) -> list[int]:
    """The bits that a key sets in a shard of the rank, each once."""
    first = shard * bits.per_shard
    found = []
    for i in range(bits.num_hashes):
        hashes = hash64(key ^ hash64(first_pair + i // 2 + 1))  # two functions: its halves
        half = hashes >> 32 if i % 2 == 0 else hashes & 0xFFFFFFFF
        found.append(first + (half * bits.per_shard >> 32))
    return list(dict.fromkeys(found))


def _tables_of_ids(ids: Tensor, offsets: Tensor, tables: Tensor) -> list[list[int]]:
    batch_size = (offsets.numel() - 1) // len(tables)
    return [
        tables[bag // batch_size].tolist()
        for bag in range(offsets.numel() - 1)
        for _ in range(int(offsets[bag]), int(offsets[bag + 1]))
    ]


def bloom_rows(ids: Tensor, offsets: Tensor, tables: Tensor, bits: BloomBits) -> Lookups:
    """See :func:`torchrec_cafe.ops.bloom_rows`."""
    features = tables.shape[0]
    batch_size = (offsets.numel() - 1) // features
    rows, out_offsets, source = [], [0], []
    for sample in range(batch_size):
        for feature in range(features):
            bag = feature * batch_size + sample
            for i in range(int(offsets[bag]), int(offsets[bag + 1])):
                found = bloom_bits(int(ids[i]), tables[feature].tolist(), bits, TOKEN_PAIRS)
                rows += found
                source += [i] * len(found)
            out_offsets.append(len(rows))
    return Lookups(
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(out_offsets, dtype=torch.int64),
        torch.tensor(source, dtype=torch.int32),
    )


def bloom_union(
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    bits: BloomBits,
    *,
    of: Literal["rows", "weights"],
) -> BitsOfSamples:
    """See :func:`torchrec_cafe.ops.bloom_union`."""
    batch_size = (offsets.numel() - 1) // len(tables)
    of_sample: list[set[int]] = [set() for _ in range(batch_size)]
    for bag in range(offsets.numel() - 1):
        table = tables[bag // batch_size].tolist()
        for i in range(int(offsets[bag]), int(offsets[bag + 1])):
            of_sample[bag % batch_size].update(bloom_bits(int(ids[i]), table, bits, FIRST_PAIR[of]))
    ends = torch.tensor([0, *map(len, of_sample)], dtype=torch.int64).cumsum(0)
    found = [bit for sample in of_sample for bit in sorted(sample)]
    return BitsOfSamples(torch.tensor(found, dtype=torch.int64), ends)


def bloom_weigh(
    weights: Tensor, ids: Tensor, offsets: Tensor, tables: Tensor, bits: BloomBits
) -> Tensor:
    """See :func:`torchrec_cafe.ops.bloom_weigh`; differentiable."""
    flat = weights.flatten()
    factors = [flat.new_zeros(0)]
    for id_, table in zip(ids.tolist(), _tables_of_ids(ids, offsets, tables), strict=True):
        total = flat.new_zeros(1)
        for bit in bloom_bits(id_, table, bits, WEIGHT_PAIRS):
            total = total + flat[bit]
        factors.append(total)
    return torch.cat(factors)


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """The scalar product of two rows: sixteen sums, halved four times, and then what is left."""
    whole = len(left) // 16 * 16
    parts = left.new_zeros(16)
    for at in range(0, whole, 16):
        parts = parts + left[at : at + 16] * right[at : at + 16]
    for half in (8, 4, 2, 1):
        parts = parts[:half] + parts[half:]
    total = parts[0]
    for x, y in zip(left[whole:], right[whole:], strict=True):
        total = total + x * y
    return total


class RowSums:
    """Sums of weights' gradients by rows of so many weights, in the order of first hits."""

    def __init__(self, per_row: int) -> None:
        self._per_row = per_row
        self._sums: dict[int, Tensor] = {}

    def add(self, weight: int, gradient: Tensor) -> None:
        """Add to the gradient of a weight."""
        row, column = divmod(weight, self._per_row)
        self._sums.setdefault(row, torch.zeros(self._per_row))[column] += gradient

    def by_row(self) -> tuple[Tensor, Tensor]:
        """The rows, and their gradients."""
        grads = [torch.zeros(0, self._per_row), *(sums[None] for sums in self._sums.values())]
        return torch.tensor(list(self._sums), dtype=torch.int64), torch.cat(grads)


def bloom_weigh_backward(  # noqa: PLR0913  as many as torchrec_cafe.ops.bloom_weigh_backward
    grad: Tensor,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    *,
    row_bits: BloomBits,
    weight_bits: BloomBits,
    per_sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`torchrec_cafe.ops.bloom_weigh_backward`, as on a CPU."""
    sums = RowSums(WEIGHTS_PER_ROW)
    features = len(tables)
    batch_size = (offsets.numel() - 1) // features
    for bag in range(offsets.numel() - 1):
        table = tables[bag // batch_size].tolist()
        of_bag = grad[bag % batch_size * features + bag // batch_size]
        for i in range(int(offsets[bag]), int(offsets[bag + 1])):
            dot = grad.new_zeros(())
            for row in bloom_bits(int(ids[i]), table, row_bits, TOKEN_PAIRS):
                dot = dot + row_dot(of_bag, rows[row].float())
            if per_sample_weights is not None:
                dot = dot * per_sample_weights[i]
            for bit in bloom_bits(int(ids[i]), table, weight_bits, WEIGHT_PAIRS):
                sums.add(bit, dot)
    return sums.by_row()


def bloom_pool(  # noqa: PLR0913  as many as torchrec_cafe.ops.bloom_pool
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    *,
    row_bits: BloomBits,
    weight_bits: BloomBits,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """See :func:`torchrec_cafe.ops.bloom_pool`."""
    found = bloom_rows(ids, offsets, tables, row_bits)
    factors = bloom_weigh(weights, ids, offsets, tables, weight_bits)
    if per_sample_weights is not None:
        factors = factors * per_sample_weights
    pooled = torch.zeros((len(found.offsets) - 1, rows.shape[1]), dtype=torch.float32)
    bags = torch.arange(len(pooled)).repeat_interleave(found.offsets.diff())
    for bag, row, source in zip(bags.tolist(), found.rows, found.source, strict=True):
        pooled[bag] += factors[source] * rows[row].float()
    return pooled.view(-1, len(tables) * rows.shape[1])
