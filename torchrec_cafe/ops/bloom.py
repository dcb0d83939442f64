"""Bloom encodings of ids: which token rows and weights of MEM-REC are theirs.

Shape legend: N ids, F features, B samples, M rows or bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error
from torchrec_cafe.ops.pool_rows import Lookups
from torchrec_cafe.ops.row_map import check_bags

#: Weights that share a row of FBGEMM.
WEIGHTS_PER_ROW = 4
#: First pair of hash functions of each encoding, as in bloom.h.
FIRST_PAIR = {"rows": 0, "weights": 8}


@dataclass(frozen=True, kw_only=True)
class BloomBits:
    """The bits that ids of a rank can set: rows of a token table, or weights.

    Attributes:
        first_shard: global number of the rank's first virtual shard, >= 0.
        shards_held: virtual shards of the rank, >= 0.
        per_shard: bits of a virtual shard, >= 1; of weights, a multiple of 4.
        num_hashes: hash functions, in [1, 16].

    Raises:
        ValueError: if the first shard is negative; operators refuse the other numbers.
    """

    first_shard: int
    shards_held: int
    per_shard: int
    num_hashes: int

    def __post_init__(self) -> None:
        """Check the first shard; see the class."""
        if self.first_shard < 0:
            raise ValueError(f"BloomBits: `first_shard` must be >= 0, got {self.first_shard}")


class BitsOfSamples(NamedTuple):
    """Bits by sample.

    Attributes:
        bits: int64 ``[M]``.
        offsets: int64 ``[B + 1]``, where each sample starts in ``bits``.
    """

    bits: Tensor
    offsets: Tensor


def bloom_rows(ids: Tensor, offsets: Tensor, tables: Tensor, bits: BloomBits) -> Lookups:
    """Find the token rows of the ids of a whole group of tables.

    The rows of an id lie in its virtual shard, ``m * num_shards // n`` for a mixed id ``m`` of a
    table of ``n`` ids, so that they are on the rank that the id is sent to. Equal ids of a table
    have equal rows; a row that two hash functions hit is there once.

    Args:
        ids: int64 ``[N]``, mixed ids less the table's ``first_id``, feature-major;
            ``num_hashes * N < 2**31``.
        offsets: int64 ``[F * B + 1]``, bag ``f * B + b`` is sample b of feature f.
        tables: int64 ``[F, 5]``, as :func:`remap` takes them, with ``shared_rows`` the number of
            virtual shards over all ranks; ``row_offset`` is not used.
        bits: where the rows lie.

    Returns:
        The rows, sample-major: bag ``b * F + f`` is sample b of feature f. ``num_hashes`` rows an
        id at most.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape or a number is not the one above, the devices differ, or ``offsets``
            does not ascend from 0 to N; the last cannot be seen on CUDA, where no memory outside
            the arguments is touched.

    Note:
        Deterministic, and the same on every device. Nothing is mutated. Not differentiable. On CUDA
        it waits for the device once if ``num_hashes > 1``, to learn how many rows there are.

    Reference: MEM-REC (ACML 2023), section 3: the token encoder.
    """
    with explained("bloom_rows", ids, offsets, tables):
        return Lookups._make(
            torch.ops.torchrec_cafe.bloom_rows.default(
                ids,
                offsets,
                tables,
                bits.first_shard,
                bits.shards_held,
                bits.per_shard,
                bits.num_hashes,
            )
        )


def bloom_union(
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    bits: BloomBits,
    *,
    of: Literal["rows", "weights"],
) -> BitsOfSamples:
    """Find the bits that the ids of each sample, of all features, set together.

    Args:
        ids: as :func:`bloom_rows` takes them.
        offsets: as :func:`bloom_rows` takes them.
        tables: as :func:`bloom_rows` takes them.
        bits: where the token rows or the weights lie.
        of: whose hash functions: of token ``"rows"`` or of ``"weights"``.

    Returns:
        The bits of each sample, each once, ascending.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: as :func:`bloom_rows`.

    Note:
        Deterministic, and the same on every device. Nothing is mutated. Not differentiable. On CUDA
        it waits for the device once, to learn how many bits there are.

    Reference: MEM-REC (ACML 2023), section 3: both encoders, of a whole sample.
    """
    if of not in FIRST_PAIR:
        raise ValueError(f"bloom_union: `of` must be one of {tuple(FIRST_PAIR)}, got {of!r}")
    with explained("bloom_union", ids, offsets, tables):
        return BitsOfSamples._make(
            torch.ops.torchrec_cafe.bloom_union.default(
                ids,
                offsets,
                tables,
                bits.first_shard,
                bits.shards_held,
                bits.per_shard,
                bits.num_hashes,
                FIRST_PAIR[of],
            )
        )


@contextmanager
def explained(
    op: str, ids: Tensor, offsets: Tensor, tables: Tensor, **floats: Tensor
) -> Iterator[None]:
    """Name the argument that an operator has refused."""
    try:
        yield
    except RuntimeError as error:
        check_bags(op, ids, offsets, tables, **floats)
        for name, tensor in floats.items():
            shape = tuple(ids.shape) if name == "per_sample_weights" else (None, None)
            check_tensor(op, name, tensor, torch.float32, shape)
        raise value_error(op, error) from None


@torch.library.register_fake("torchrec_cafe::bloom_rows")
def _(  # noqa: PLR0913  the schema has as many arguments
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    first_shard: int,
    shards_held: int,
    rows_per_shard: int,
    num_hashes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device("bloom_rows", ids=ids, offsets=offsets, tables=tables)
    size = ids.shape[0] if num_hashes == 1 else torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(size), torch.empty_like(offsets), ids.new_empty(size, dtype=torch.int32)


@torch.library.register_fake("torchrec_cafe::bloom_union")
def _(  # noqa: PLR0913  the schema has as many arguments
    ids: Tensor,
    offsets: Tensor,
    tables: Tensor,
    first_shard: int,
    shards_held: int,
    bits_per_shard: int,
    num_hashes: int,
    first_pair: int,
) -> tuple[Tensor, Tensor]:
    check_same_device("bloom_union", ids=ids, offsets=offsets, tables=tables)
    size = torch.library.get_ctx().new_dynamic_size()
    batch_size = (offsets.shape[0] - 1) // tables.shape[0]
    return ids.new_empty(size), offsets.new_empty(batch_size + 1)
