"""Learned factors of the ids that a pool tracks."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_cafe.ops.hot_sketch import SketchState
from torchrec_cafe.ops.key_factors import WEIGHTS_PER_LINE
from torchrec_cafe.ops.learning import ScaledRows
from torchrec_cafe.ops.pool_rows import Lookups
from torchrec_cafe.ops.reference.cafe import hash64, learn
from torchrec_cafe.ops.reference.mem_rec import RowSums, row_dot
from torchrec_cafe.ops.row_map import Remapped

_FIRST_SALT = 17
#: the first hash gives the line and the weights in so many parts of it, each further one in eight
_PARTS_OF_FIRST = 4


def weights_of_key(key: int, shard: int, per_shard: int, num_hashes: int) -> list[int]:
    """The weights of a key, one in each of ``num_hashes`` parts of a line, ascending."""
    hashes = [hash64(key ^ hash64(_FIRST_SALT + i)) for i in range(3)]
    lines = per_shard // WEIGHTS_PER_LINE
    line = shard * lines + ((hashes[0] >> 32) * lines >> 32)
    bytes_ = hashes[0].to_bytes(8, "little")[:_PARTS_OF_FIRST]
    bytes_ += hashes[1].to_bytes(8, "little") + hashes[2].to_bytes(8, "little")
    found = []
    for part in range(num_hashes):
        begin, end = (WEIGHTS_PER_LINE * at // num_hashes for at in (part, part + 1))
        found.append(line * WEIGHTS_PER_LINE + begin + (bytes_[part] * (end - begin) >> 8))
    return found


def key_factors(
    weights: Tensor,
    keys: Tensor,
    shards: Tensor,
    source: Tensor | None = None,
    *,
    num_hashes: int,
) -> Tensor:
    """See :func:`torchrec_cafe.ops.key_factors`; differentiable."""
    lines = weights.view(-1, WEIGHTS_PER_LINE)
    factors = [weights.new_zeros(0)]
    for found in _weights_of_keys(keys, shards, weights.shape[1], num_hashes):
        if not found:
            factors.append(weights.new_ones(1))
            continue
        line = found[0] // WEIGHTS_PER_LINE
        mask = torch.zeros(WEIGHTS_PER_LINE, dtype=torch.bool)
        mask[torch.tensor(found) - line * WEIGHTS_PER_LINE] = True
        parts = torch.where(mask, lines[line], 0.0)
        for half in (8, 4, 2, 1):
            parts = parts[:half] + parts[half:]
        factors.append(parts)
    of_keys = torch.cat(factors)
    return of_keys if source is None else of_keys[source]


def _weights_of_keys(
    keys: Tensor, shards: Tensor, per_shard: int, num_hashes: int
) -> list[list[int]]:
    """The weights of each key, none where the shard is -1."""
    return [
        weights_of_key(key, shard, per_shard, num_hashes) if shard >= 0 else []
        for key, shard in zip(keys.tolist(), shards.tolist(), strict=True)
    ]


def factor_gradients(  # noqa: PLR0913  as many as torchrec_cafe.ops.factor_gradients
    grad: Tensor,
    table: Tensor,
    found: Lookups,
    keys: Tensor,
    shards: Tensor,
    *,
    features: Tensor,
    given: Tensor | None = None,
    shape: tuple[int, int],
    num_hashes: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`torchrec_cafe.ops.factor_gradients`, as on a CPU; rows in order of first hits."""
    sums = RowSums(WEIGHTS_PER_LINE)
    weights = _weights_of_keys(keys, shards, shape[1], num_hashes)
    for bag in range(len(found.offsets) - 1):
        if features[bag % len(features)] < 0:
            continue
        for m in range(int(found.offsets[bag]), int(found.offsets[bag + 1])):
            key = int(found.source[m])
            value = row_dot(grad[bag], table[found.rows[m]].float())
            if given is not None:
                value = value * given[key]
            for at in weights[key]:
                sums.add(at, value)
    return sums.by_row()


def learn_scaled(  # noqa: PLR0913  as many as torchrec_cafe.ops.learn_scaled
    state: SketchState,
    norms: Tensor,
    grad: Tensor,
    offsets: Tensor,
    batch: Remapped,
    scaled: ScaledRows,
    *,
    features: Tensor,
    weights: Tensor | None = None,
    decay: float = 1.0,
    growth: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`torchrec_cafe.ops.learn_scaled`: one after the other."""
    options = {"features": features, "weights": weights, "decay": decay, "growth": growth}
    learn(state, norms, grad, offsets, batch, **options)
    return factor_gradients(
        *(grad, scaled.table, scaled.found, batch.keys, scaled.shards),
        features=features,
        given=weights,
        shape=(len(norms), scaled.weights_per_shard),
        num_hashes=scaled.num_hashes,
    )
