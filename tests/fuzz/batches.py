"""Batches as they come from a broken data pipeline, and what a plain reading says of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

#: rows of each table, and the features that look it up; the last table is TorchRec's own
SIZES = {"t_a": 900, "t_b": 7, "t_c": 300, "t_own": 11}
FEATURES = {"f_a": "t_a", "f_b": "t_b", "f_b2": "t_b", "f_c": "t_c", "f_own": "t_own"}
KEYS = list(FEATURES)
#: ids that are in no table; FBGEMM takes -1 for a row that was pruned, and fails
NOWHERE = [-1, -2, 900, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63)]
STRAY = st.sampled_from(NOWHERE)
FLOATS = [0.0, 0.5, 1.0, -1.5, 2.0, 0.25, 1.0, 1.0, math.nan, math.inf]


@dataclass
class Batch:
    """What a ``KeyedJaggedTensor`` is made of, as lists, right or wrong.

    Attributes:
        bags: ids of each bag, key by key.
        num_samples: B.
        weights: of each id.
        given: ``lengths``, ``offsets`` or both.
        lengths: of the bags, as they are given.
        offsets: of the bags, as they are given.
        options: further arguments of a ``KeyedJaggedTensor``.
        dtypes: of ids, of lengths and of weights.
    """

    bags: list[list[int]]
    num_samples: int
    weights: list[float] | None
    given: str = "lengths"
    lengths: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=lambda: list(KEYS))
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.int64, torch.int64, torch.float32)
    shape: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        if not self.lengths:
            self.lengths = [len(bag) for bag in self.bags]
        if not self.offsets:
            self.offsets = [0]
            for length in self.lengths:
                self.offsets.append(self.offsets[-1] + length)

    @property
    def ids(self) -> list[int]:
        return [number for bag in self.bags for number in bag]

    def tensor(self) -> KeyedJaggedTensor:
        """As TorchRec takes it."""
        of_ids, of_lengths, of_weights = self.dtypes
        parts: dict[str, Tensor] = {}
        if self.given in ("lengths", "both"):
            parts["lengths"] = torch.tensor(self.lengths, dtype=of_lengths)
        if self.given in ("offsets", "both"):
            parts["offsets"] = torch.tensor(self.offsets, dtype=of_lengths)
        if self.weights is not None:
            parts["weights"] = torch.tensor(self.weights, dtype=of_weights)
        values = torch.tensor(self.ids, dtype=of_ids).view(self.shape)
        options = {"stride": self.num_samples} | self.options
        return KeyedJaggedTensor(keys=self.keys, values=values, **parts, **options)

    def bag(self, feature: str, sample: int) -> list[int]:
        return self.bags[KEYS.index(feature) * self.num_samples + sample]

    def regrouped(self) -> Batch:
        """The bags as lengths or offsets have them; of a sound batch."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        if self.given == "offsets":
            starts = self.offsets
        bags = [self.ids[begin:end] for begin, end in itertools.pairwise(starts)]
        return Batch(bags, self.num_samples, self.weights)

    def clean(self) -> Batch:
        """The batch that it is to be taken for: ids that are nowhere are id 0."""
        bags = [
            [number if 0 <= number < self.size_of(at) else 0 for number in bag]
            for at, bag in enumerate(self.bags)
        ]
        return Batch(bags, self.num_samples, self.weights)

    def size_of(self, bag: int) -> int:
        return SIZES[FEATURES[KEYS[bag // self.num_samples]]]

    @property
    def has_strays(self) -> bool:
        """Whether an id of a table with a kind is out of range."""
        own = KEYS.index("f_own") * self.num_samples
        return self.clean().bags[:own] != self.bags[:own]

    @property
    def is_pruned(self) -> bool:
        """Whether TorchRec's own table is asked for a pruned row, at which FBGEMM fails."""
        return any(-1 in bag for bag in self.bags[KEYS.index("f_own") * self.num_samples :])

    def is_sound(self) -> bool:
        """Whether bags, ids and weights fit each other."""
        size, bags = len(self.ids), len(self.keys) * self.num_samples
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        sound = self.keys == KEYS and self.options.get("stride", self.num_samples) == (
            self.num_samples
        )
        if self.given != "offsets":
            sound &= len(self.lengths) == bags and min(self.lengths, default=0) >= 0
            sound &= starts[-1] == size
        if self.given != "lengths":
            sound &= len(self.offsets) == bags + 1 and self.offsets == sorted(self.offsets)
            sound &= self.offsets[:1] == [0] and self.offsets[-1] == size
        if self.given == "both":
            sound &= self.offsets == starts
        sound &= self.options.get("stride_per_key_per_rank") is None
        per_key = self.options.get("length_per_key")
        if per_key is not None:
            step = self.num_samples
            sound &= per_key == [sum(self.lengths[i * step :][:step]) for i in range(len(KEYS))]
        sound &= self.dtypes[0] in (torch.int32, torch.int64) and self.shape == (-1,)
        sound &= self.dtypes[1] in (torch.int32, torch.int64)
        if self.weights is not None:
            sound &= len(self.weights) == size
            sound &= self.dtypes[2] in (torch.float32, torch.float64)
        return bool(sound)


Change = Callable[[Batch, int], dict[str, Any]]


def _nudged(numbers: list[int], at: int, by: int) -> list[int]:
    """A list with one of its numbers changed."""
    if not numbers:
        return [by]
    return [n + by * (i == at % len(numbers)) for i, n in enumerate(numbers)]


def _moved(numbers: list[int], at: int, by: int) -> list[int]:
    """The same sum, from other numbers."""
    return _nudged(_nudged(numbers, at, by), at + 1, -by) if len(numbers) > 1 else [by]


#: what can be wrong with a batch; a change may leave a small one as it is
DEFECTS: dict[str, Change] = {
    "a length too long": lambda b, at: {"lengths": _nudged(b.lengths, at, 1)},
    "a length too short": lambda b, at: {"lengths": _nudged(b.lengths, at, -1)},
    "a length below zero": lambda b, at: {"lengths": _moved(b.lengths, at, 5)},
    "lengths that overflow": lambda b, at: {"lengths": _moved(b.lengths, at, 2**62)},
    "lengths that wrap": lambda b, at: {
        "lengths": [n + 2**62 for n in b.lengths[:4]] + b.lengths[4:]
    },
    "a length too many": lambda b, at: {"lengths": [*b.lengths, 0]},
    "a length too few": lambda b, at: {"lengths": b.lengths[1:]},
    "an offset off": lambda b, at: {"offsets": _nudged(b.offsets, at, 1), "given": "offsets"},
    "an offset that falls": lambda b, at: {
        "offsets": _nudged(b.offsets, at, -3),
        "given": "offsets",
    },
    "an offset far away": lambda b, at: {"offsets": _nudged(b.offsets, at, 2**62)},
    "an offset too many": lambda b, at: {"offsets": [*b.offsets, b.offsets[-1]]},
    "offsets that differ": lambda b, at: {"offsets": _nudged(b.offsets, at, 1), "given": "both"},
    "a weight too many": lambda b, at: {"weights": [1.0] * (len(b.ids) + 1)},
    "a weight too few": lambda b, at: {"weights": [1.0] * max(0, len(b.ids) - 1)},
    "whole weights": lambda b, at: {
        "weights": [1.0] * len(b.ids),
        "dtypes": (*b.dtypes[:2], torch.int64),
    },
    "weights in half precision": lambda b, at: {
        "weights": [1.0] * len(b.ids),
        "dtypes": (*b.dtypes[:2], torch.float16),
    },
    "ids with a fraction": lambda b, at: {"dtypes": (torch.float32, *b.dtypes[1:])},
    "ids of a byte": lambda b, at: {
        "bags": [[n % 7 for n in bag] for bag in b.bags],
        "dtypes": (torch.uint8, *b.dtypes[1:]),
    },
    "short lengths": lambda b, at: {
        "lengths": [min(n, 9) for n in b.lengths],
        "given": "lengths",
        "dtypes": (b.dtypes[0], torch.int16, b.dtypes[2]),
    },
    "ids in rows": lambda b, at: {"shape": (-1, 1)},
    "another stride": lambda b, at: {"options": {"stride": b.num_samples + 1}},
    "keys that lie": lambda b, at: {
        "options": {"length_per_key": _nudged([0] * len(KEYS), at, len(b.ids) + 1)}
    },
    "keys in another order": lambda b, at: {"keys": [*KEYS[1:], KEYS[0]]},
    "a key that is missing": lambda b, at: {"keys": [*KEYS[:4], "f_other"]},
    "a key that is there twice": lambda b, at: {"keys": [*KEYS[:4], KEYS[0]]},
    "variable stride": lambda b, at: {
        "options": {"stride": None, "stride_per_key_per_rank": [[b.num_samples]] * len(KEYS)}
    },
}


@st.composite
def batches(draw: st.DrawFn, *, weighted: bool, defects: bool = True) -> Batch:
    """A batch, sound or not."""
    num_samples = draw(st.integers(0, 3))
    strays = draw(st.booleans())
    numbers = st.integers(0, 39) if not strays else st.one_of(st.integers(0, 6), STRAY)
    sizes = st.lists(
        st.integers(0, 3), min_size=len(KEYS) * num_samples, max_size=len(KEYS) * num_samples
    )
    bags = [draw(st.lists(numbers, min_size=n, max_size=n)) for n in draw(sizes)]
    batch = Batch(bags, num_samples, None)
    tame = batch.clean().bags
    own = KEYS.index("f_own") * num_samples
    if not strays:
        bags = tame
    # FBGEMM's own answer to -1 is a failure of its lookup.
    bags = bags[:own] + [
        [right if number == -1 else number for number, right in zip(bag, good, strict=True)]
        for bag, good in zip(bags[own:], tame[own:], strict=True)
    ]
    of_ids = draw(st.sampled_from([torch.int64, torch.int32]))
    if of_ids is torch.int32:
        bags = [[max(-(2**31), min(n, 2**31 - 1)) for n in bag] for bag in bags]
    size = sum(map(len, bags))
    weights = None
    if weighted:
        weights = draw(st.lists(st.sampled_from(FLOATS), min_size=size, max_size=size))
    batch = Batch(
        bags,
        num_samples,
        weights,
        given=draw(st.sampled_from(["lengths", "offsets", "both"])),
        dtypes=(
            of_ids,
            draw(st.sampled_from([torch.int64, torch.int32])),
            draw(st.sampled_from([torch.float32, torch.float64])),
        ),
    )
    if defects:
        for name in draw(st.lists(st.sampled_from(sorted(DEFECTS)), max_size=2)):
            batch = _broken(batch, name, draw(st.integers(0, 20)))
    return batch


def _broken(batch: Batch, name: str, at: int) -> Batch:
    changes = DEFECTS[name](batch, at)
    options = batch.options | changes.pop("options", {})
    broken = replace(batch, **changes, options=options)
    if broken.dtypes[1] is not torch.int64:  # what does not fit was another defect
        most = torch.iinfo(broken.dtypes[1]).max
        broken.lengths = [max(-most, min(n, most)) for n in broken.lengths]
        broken.offsets = [max(-most, min(n, most)) for n in broken.offsets]
    return broken
