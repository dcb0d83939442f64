"""Batches with more rows than there are slots, cut into parts of whole tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchrec_cafe.ops import PooledKeys
from torchrec_cafe.tables.planned_lookup import ScratchpadFullError


def split_by_table(
    bags: PooledKeys, features: Sequence[int], num_slots: int, error: ScratchpadFullError
) -> Iterator[PooledKeys]:
    """Cut a batch into parts of whole tables, whose rows fit the slots.

    Args:
        bags: of all features.
        features: of each table; a table's are neighbours.
        num_slots: distinct rows that a part may have.
        error: what to raise if a table has more.
    """
    num_features = sum(features)
    feature_of_bag = torch.arange(len(bags.offsets) - 1) % num_features
    lengths = bags.offsets.diff()
    feature = feature_of_bag.repeat_interleave(lengths)
    first = 0
    taken: list[int] = []  # distinct rows of each table of the part
    ends = list(itertools.accumulate(features))
    for number, end in enumerate(ends):
        begin = end - features[number]
        rows = len(bags.keys[(feature >= begin) & (feature < end)].unique())
        if rows > num_slots:
            raise error
        if sum(taken) + rows > num_slots:
            yield _features_from_to(bags, feature, feature_of_bag, first, begin)
            first, taken = begin, []
        taken.append(rows)
    yield _features_from_to(bags, feature, feature_of_bag, first, num_features)


def _features_from_to(
    bags: PooledKeys, feature: Tensor, feature_of_bag: Tensor, begin: int, end: int
) -> PooledKeys:
    inside = (feature >= begin) & (feature < end)
    bag_inside = (feature_of_bag >= begin) & (feature_of_bag < end)
    offsets = torch.zeros(int(bag_inside.sum()) + 1, dtype=torch.int64)
    torch.cumsum(bags.offsets.diff()[bag_inside], 0, out=offsets[1:])
    return PooledKeys(bags.keys[inside], offsets, bags.source[inside])
