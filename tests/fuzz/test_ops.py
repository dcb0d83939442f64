"""Operators with spoiled arguments: a result or a clear error, and no memory but their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.fuzz import test_models
from tests.fuzz.operators import Call, operators
from tests.fuzz.profile import fuzz

# Many processes, or many cases: on a busy machine they take long.
pytestmark = pytest.mark.timeout(900)

CASES = 6500
#: what the memory around an argument holds
GUARD, CANARY = 64, 0x5A
NUMBERS = [-(2**63), -(2**31), -4, -1, 0, 1, 3, 2**31 - 1, 2**31, 2**32, 2**47, 2**62, 2**63 - 1]
SPOILS = [
    *("dtype", "dimension", "shorter", "longer", "empty", "strided", "meta"),
    *("value", "value", "value", "order", "shared", "number"),
]
#: sizes must not make the operators allocate much
SMALL = {"num_ids"}
#: what is in a slot map is its operators' own, and trusted
TRUSTED = {"entries", "queue", "counters of slots", "slots", "free"}
CONTENT = {"shorter", "longer", "value", "order"}


class Guarded:
    """A copy of a tensor between bytes that nobody may touch."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self._memory = torch.full((size + 2 * GUARD,), CANARY, dtype=torch.uint8)
        self.tensor = self._memory[GUARD : GUARD + size].view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor)

    def is_whole(self) -> bool:
        around = torch.cat([self._memory[:GUARD], self._memory[-GUARD:]])
        return bool((around == CANARY).all())


def _retyped(value: Tensor, at: int) -> Tensor:
    return value.to([torch.int32, torch.int64, torch.float32, torch.float16][at % 4])


def _shorter(value: Tensor, at: int) -> Tensor:
    return value[: at % max(1, len(value))].clone()


def _valued(value: Tensor, at: int) -> Tensor:
    flat = value.reshape(-1).clone()
    if flat.numel() == 0:
        return value
    if value.dtype.is_floating_point:
        flat[at % flat.numel()] = [torch.nan, torch.inf, -1.0, 3e38][at % 4]
    else:
        most = torch.iinfo(value.dtype).max
        flat[at % flat.numel()] = max(-most - 1, min(NUMBERS[at % len(NUMBERS)], most))
    return flat.view(value.shape)


#: ways to spoil a tensor
CHANGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "dtype": _retyped,
    "dimension": lambda value, at: value.unsqueeze(at % (value.dim() + 1)),
    "shorter": _shorter,
    "longer": lambda value, at: torch.cat([value, value[:1]]),
    "empty": lambda value, at: value.reshape(-1)[:0].view((*value.shape[:-1], 0)),
    "strided": lambda value, at: torch.stack([value, value], -1)[..., 0],
    "meta": lambda value, at: value.to("meta"),
    "value": _valued,
    "order": lambda value, at: value.reshape(-1).flip(0).view(value.shape),
}


def _spoil(given: dict[str, Any], how: str, name: str, other: str, at: int) -> None:
    """Change one argument, if this can be done to it."""
    value = given[name]
    if not isinstance(value, Tensor):
        number = NUMBERS[at % len(NUMBERS)]
        if isinstance(value, int) and not (name in SMALL and number > 2**20):
            given[name] = number
        return
    kept = "counters of slots" if name == "counters" and "queue" in given else name
    if value.dim() == 0 or how == "number" or (kept in TRUSTED and how in CONTENT):
        return
    if how in CHANGES:
        given[name] = CHANGES[how](value, at)
    elif isinstance(given[other], Tensor) and _is_plain(given[other]):
        of_other = given[other].reshape(-1).view(torch.uint8)
        size = value.numel() * value.element_size()
        if 0 < size <= of_other.numel():
            given[name] = of_other[:size].view(value.dtype).view(value.shape)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dim() > 0 and tensor.is_contiguous() and tensor.stride(-1) == 1


class Shaker:
    """Calls operators with arguments in guarded memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: Counter[str] = Counter()

    def call(self, operator: Call, spoils: list[tuple[str, int, int]]) -> None:
        run, arguments = operator
        guards = {n: Guarded(v) for n, v in arguments.items() if isinstance(v, Tensor)}
        given = arguments | {name: guard.tensor for name, guard in guards.items()}
        for how, which, at in spoils:
            names = sorted(given)
            _spoil(given, how, names[which % len(names)], names[at % len(names)], at)
        before = {n: v.clone() for n, v in given.items() if isinstance(v, Tensor)}
        outcome = "done"
        try:
            run(**given)
        except (TypeError, ValueError, OSError) as error:
            outcome = "no file" if isinstance(error, OSError) else "refused"
        except RuntimeError:  # torch's own
            if not any(value.is_meta for value in before.values()):
                raise
            outcome = "meta"
        self.seen[outcome] += 1
        if outcome == "refused":
            for name, value in before.items():
                assert value.is_meta or _same(value, given[name]), name
        assert all(guard.is_whole() for guard in guards.values())


def _same(one: Tensor, other: Tensor) -> bool:
    bits = [part.new_empty(part.numel()).copy_(part.reshape(-1)) for part in (one, other)]
    return torch.equal(*(part.view(torch.uint8) for part in bits))


def _fuzz(folder: str) -> dict[str, Counter[str]]:
    path = Path(folder)
    path.mkdir()
    calls = [operators(seed, path) for seed in range(10)]
    names = sorted(calls[0])
    shakers = {name: Shaker(path) for name in names}
    spoil = st.tuples(st.sampled_from(SPOILS), st.integers(0, 30), st.integers(0, 200))

    @fuzz(CASES)
    @given(st.sampled_from(names), st.integers(0, 9), st.lists(spoil, max_size=3))
    def run(name: str, seed: int, spoils: list[tuple[str, int, int]]) -> None:
        shakers[name].call(calls[seed][name], spoils)

    run()
    return {name: shaker.seen for name, shaker in shakers.items()}


def test_every_operator(tmp_path: Path):
    (seen,) = run_ranks(1, tmp_path, _fuzz, str(tmp_path / "files"))
    assert sum(sum(counts.values()) for counts in seen.values()) > 0.95 * CASES
    for name, counts in seen.items():
        assert counts["done"] > 20, name
        assert counts["refused"] > 20, name


def test_there_are_ten_thousand_cases():
    assert CASES + test_models.CASES * len(test_models.setups("rows")) >= 10_000
