"""Batches whose bags are not what they say: refused before anything is sent or looked up.

Shape legend: N ids, F features, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NoReturn

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cafe.distributed.table_collections import TableConfig

_INTEGERS = (torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64)  # FBGEMM's CPU operators know no others


class InputCheck:
    """Refuses what TorchRec would split, send and look up by lengths that lie.

    TorchRec itself checks a collection's first batch only.

    Args:
        configs: the tables of a collection, with the features that look into them.
    """

    def __init__(self, configs: Sequence[TableConfig]) -> None:
        """Note the features; see the class."""
        self._tables = {name: config.name for config in configs for name in config.feature_names}
        self._keys: list[str] | None = None

    def __call__(self, features: KeyedJaggedTensor) -> None:
        """Check; see the class.

        On the CPU this reads lengths and offsets, once each; on other devices their values are left
        to FBGEMM, since they would have to be waited for.

        Args:
            features: of all tables, maybe of others, too; not mutated.

        Raises:
            TypeError: for a dtype that is none of ids, lengths, offsets or weights.
            ValueError: for anything else that is not as :class:`KeyedJaggedTensor` has it, for
                keys other than those of the first batch, for features that differ in batch size.
        """
        self._check_keys(features.keys())
        if features.variable_stride_per_key():
            _refuse(
                f"tables {sorted(set(self._tables.values()))}",
                "tables with `table=` need the same batch size for every feature, got a "
                "KeyedJaggedTensor with variable stride; leave `table` out or pad the batch",
            )
        check_bags(features)

    def _check_keys(self, keys: list[str]) -> None:
        """TorchRec takes features by their places in the first batch ever after."""
        if keys == self._keys:
            return
        if self._keys is not None:
            _refuse(
                "features",
                f"the keys of every batch must be those of the first, {self._keys}, in that order, "
                f"got {keys}; make all batches alike",
            )
        for feature, table in self._tables.items():
            if keys.count(feature) != 1:
                _refuse(
                    f"table {table!r}",
                    f"a batch must have its feature {feature!r} once, got keys {keys}; name the "
                    "feature in the KeyedJaggedTensor, or take it out of the table's feature_names",
                )
        self._keys = list(keys)


def check_bags(features: KeyedJaggedTensor) -> None:
    """Check that bags lie where a batch says.

    Args:
        features: of one batch size for all keys; not mutated.

    Raises:
        TypeError: as :class:`InputCheck`.
        ValueError: as :class:`InputCheck`.
    """
    keys, values, stride = features.keys(), features.values(), features.stride()
    where = f"features {keys}"
    bags = len(keys) * stride
    _check(where, "values", values, _INTEGERS)
    lengths, offsets = features.lengths_or_none(), features.offsets_or_none()
    if lengths is None and offsets is None:
        _refuse(where, "a batch must have `lengths` or `offsets`, got neither; give one of them")
    for name, given, size in (("lengths", lengths, bags), ("offsets", offsets, bags + 1)):
        if given is None:
            continue
        _check(where, name, given, _INTEGERS)
        if given.numel() != size:
            _refuse(
                where,
                f"`{name}` must have {size} elements for {len(keys)} keys and {stride} samples, "
                f"got {given.numel()}; give one for each bag, key by key",
            )
    weights = features.weights_or_none()
    if weights is not None:
        _check(where, "weights", weights, _FLOATS)
        if weights.numel() != values.numel():
            _refuse(
                where,
                f"`weights` must have one for each of the {values.numel()} ids, got "
                f"{weights.numel()}; give as many, or none",
            )
    # Values of other devices would have to be waited for.
    if offsets is not None and offsets.is_cpu:
        _check_offsets(features, offsets)
    elif lengths is not None and lengths.is_cpu:
        _check_lengths(features, lengths)


def weights_of(features: KeyedJaggedTensor) -> Tensor | None:
    """The per-sample weights of a batch as TBEs take them, float32 ``[N]``, if there are any."""
    weights = features.weights_or_none()
    return None if weights is None else weights.float()


def _check_offsets(features: KeyedJaggedTensor, offsets: Tensor) -> None:
    where, size, lengths = f"features {features.keys()}", features.values().numel(), offsets.diff()
    least, most = (int(end) for end in offsets.aminmax())
    first, last = int(offsets[0]), int(offsets[-1])
    if least < 0 or most > size or first != 0 or last != size:  # else differences do not overflow
        _refuse(
            where,
            f"`offsets` must ascend from 0 to the number of ids, {size}, got a first of {first}, a "
            f"last of {last}, and values in [{least}, {most}]; make them the sums of the bags' "
            "lengths",
        )
    if lengths.numel() > 0:
        _check_ascent(features, lengths, int(lengths.min()))
    given = features.lengths_or_none()
    if given is not None and bool((given.to(lengths.device) != lengths).any()):
        _refuse(
            where,
            "`offsets` must be the sums of `lengths`, got two that differ; give one of them",
        )
    _check_key_lengths(features, lengths)


def _check_lengths(features: KeyedJaggedTensor, lengths: Tensor) -> None:
    size, most, total = features.values().numel(), 0, 0
    if lengths.numel() > 0:
        least, most = (int(end) for end in lengths.aminmax())
        _check_ascent(features, lengths, least)
        total = int(lengths.sum()) if most <= size else most  # a sum of larger ones could overflow
    if total != size:
        _refuse(
            f"features {features.keys()}",
            f"lengths of bags must add up to the number of ids, {size}, got {total}"
            f"{' and more' if most > size else ''}; give each bag the number of its ids",
        )
    _check_key_lengths(features, lengths)


def _check_ascent(features: KeyedJaggedTensor, lengths: Tensor, least: int) -> None:
    if least < 0:
        feature = features.keys()[int(lengths.argmin()) // features.stride()]
        _refuse(
            f"feature {feature!r}",
            f"lengths of bags must be >= 0, got {least}; give ascending offsets or lengths >= 0",
        )


def _check_key_lengths(features: KeyedJaggedTensor, lengths: Tensor) -> None:
    """What a batch knows of its keys is where TorchRec cuts it."""
    of_keys, starts = features.length_per_key_or_none(), features.offset_per_key_or_none()
    if of_keys is None and starts is None:
        return
    expected = lengths.view(len(features.keys()), features.stride()).sum(1).tolist()
    for name, given, right in (
        ("length_per_key", of_keys, expected),
        ("offset_per_key", starts, [0, *accumulate(expected)]),
    ):
        if given is not None and list(given) != right:
            _refuse(
                f"features {features.keys()}",
                f"`{name}` must be {right}, as lengths have it, got {list(given)}; leave it out",
            )


def _check(where: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(
            f"{where}: `{name}` must be {wanted}, got {tensor.dtype}; convert it with "
            f".to({torch.int64 if dtypes is _INTEGERS else torch.float32})"
        )
    if tensor.dim() != 1:
        _refuse(
            where,
            f"`{name}` must have one dimension, got shape {list(tensor.shape)}; flatten it, key by "
            "key",
        )


def _refuse(where: str, reason: str) -> NoReturn:
    raise ValueError(f"{where}: {reason}")
