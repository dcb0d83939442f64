"""From mixed ids back to ids, for reports; in plain PyTorch, as nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a round of csrc/hash.h, last step first: what undoes a factor, modulo 2^64, and the addend.
_FACTORS = (0x94D049BB133111EB, 0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD)
_ADDENDS = (0, 0xBF58476D1CE4E5B9, 0x9E3779B97F4A7C15)
_WORD = 1 << 64


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


_STEPS = tuple(
    (_signed(pow(factor, -1, _WORD)), _signed(addend))
    for factor, addend in zip(_FACTORS, _ADDENDS, strict=True)
)


def unmix_ids(mixed: Tensor, num_embeddings: int) -> Tensor:
    """The ids that :func:`torchrec_cafe.ops.mix_ids` has mixed.

    Args:
        mixed: int64 ``[N]``, in [0, num_embeddings).
        num_embeddings: rows of the table, in [1, 2**47).

    Returns:
        int64 ``[N]``.

    Note:
        Deterministic, and the same on every device. Nothing is mutated. Not differentiable.
    """
    bits = (num_embeddings - 1).bit_length()
    if bits < 2:  # too few to mix
        return mixed.clone()
    mask, shift = (1 << bits) - 1, (bits + 1) // 2
    ids = mixed.clone()
    waiting = torch.ones_like(ids, dtype=torch.bool)
    while waiting.any():  # a round of mixing is repeated while it gives no id
        x = ids[waiting]
        for inverse, addend in _STEPS:
            x = x ^ (x >> shift)
            x = ((x - addend) * inverse) & mask
        x = x ^ (x >> shift)
        ids[waiting] = x
        waiting = ids >= num_embeddings
    return ids
