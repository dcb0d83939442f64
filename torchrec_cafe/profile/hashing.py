"""The hash that stands for an id in a profile: what decides whether the id is sampled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Bits of a hash; the rest of a 64-bit key numbers the batches of a piece.
HASH_BITS = 48
#: Bits of the number of a batch within a piece.
BATCH_BITS = 64 - HASH_BITS
#: Hashes are below this.
HASH_RANGE = 1 << HASH_BITS

_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
# Ids hashed at a time: they stay in the cache of a core over the dozen passes.
_BLOCK = 1 << 14


def hash_keys(ids: NDArray[np.int64], batches: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Keys whose order is that of the ids' hashes, then of the batches.

    The hash is the upper 48 bits of SplitMix64 (Steele et al., OOPSLA 2014), a bijection of 64
    bits: of a hundred thousand sampled ids, one is confused with another of a billion ids with a
    probability of 4e-6 each.

    Args:
        ids: int64 ``[N]``.
        batches: uint64 ``[N]``, number of the batch of each id, in [0, 2**16).
        seed: of the hash, >= 0.

    Returns:
        uint64 ``[N]``: ``hash << 16 | batch``.

    Note:
        Deterministic.
    """
    keys = ids.astype(np.uint64)
    start = np.uint64((seed + 1) * _INCREMENT % 2**64)
    scratch = np.empty(min(_BLOCK, len(keys)), dtype=np.uint64)
    for begin in range(0, len(keys), _BLOCK):
        block = keys[begin : begin + _BLOCK]
        shifted = scratch[: len(block)]
        block += start
        for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
            np.right_shift(block, np.uint64(shift), out=shifted)
            block ^= shifted
            block *= np.uint64(factor)
        block &= np.uint64(2**64 - 2**BATCH_BITS)
        block |= batches[begin : begin + _BLOCK]
    return keys
