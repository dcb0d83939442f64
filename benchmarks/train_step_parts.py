"""Where a kind's step takes longer than the baseline's: milliseconds by part, of torch.profiler.

What a part is, :mod:`examples.dlrm.step_parts` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tqdm import tqdm

from benchmarks.common import Row
from examples.dlrm.step_parts import median_parts, profile_parts
from torchrec_cafe.config.text import as_text


def measure_parts(
    steps: Mapping[str, Callable[[], object]], baseline: str, rounds: int, steps_per_turn: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of the parts of each kind's step, medians over rounds in which all take turns.

    Args:
        steps: by kind, one step.
        baseline: the kind that the others are compared with.
        rounds: how many.
        steps_per_turn: of each kind in a round.

    Returns:
        By part, the milliseconds by kind; most above the baseline first.
    """
    turns: dict[str, list[dict[str, float]]] = {kind: [] for kind in steps}
    for number in tqdm(range(rounds), desc="parts", unit="round", leave=False):
        for kind in list(steps)[:: 1 if number % 2 else -1]:
            turns[kind].append(profile_parts(steps[kind], steps_per_turn))
    medians = {kind: median_parts(of_kind) for kind, of_kind in turns.items()}
    parts = {
        part: {kind: of_kind.get(part, 0.0) for kind, of_kind in medians.items()}
        for part in {part for of_kind in medians.values() for part in of_kind}
    }
    return dict(sorted(parts.items(), key=lambda item: item[1][baseline] - max(item[1].values())))


def parts_table(case: str, parts: Mapping[str, Mapping[str, float]], baseline: str) -> str:
    """The parts as a table, and each kind's difference from the baseline."""
    kinds = list(next(iter(parts.values())))
    others = [kind for kind in kinds if kind != baseline]
    header = [f"{case}: host ms a step", *kinds, *(f"{kind} - {baseline}" for kind in others)]
    total = {kind: sum(of_kind[kind] for of_kind in parts.values()) for kind in kinds}
    table = [header]
    for part, of_kind in [*parts.items(), ("sum", total)]:
        differences = [of_kind[kind] - of_kind[baseline] for kind in others]
        table.append(
            [part, *(f"{of_kind[kind]:.3f}" for kind in kinds), *(f"{d:+.3f}" for d in differences)]
        )
    return as_text(table)


def parts_rows(case: str, parts: Mapping[str, Mapping[str, float]], baseline: str) -> list[Row]:
    """The parts as figures, beside the baseline's."""
    return [
        Row(f"{case}/{kind}/{part}", value, "ms", of_kind[baseline])
        for part, of_kind in parts.items()
        for kind, value in of_kind.items()
        if kind != baseline
    ]
