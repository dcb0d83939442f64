"""Where a kind's step takes longer than the baseline's: milliseconds by part, of torch.profiler.

Every operator counts where it runs: an operator of ``torchrec_cafe`` for itself, FBGEMM's for its
forward or backward, all others for the innermost part of the step that they are in. Times are of
the host alone; on CUDA that is the time to launch.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from benchmarks.common import Row
from torchrec_cafe.config.text import as_text
from torchrec_cafe.tables import CompressedBags

_SETTLE = "CompressedBags.settle"
_OPERATOR = "torchrec_cafe::"
_DENSE = "dense layers"
_REST = "everything else"
#: parts by how the profiler's names begin; of an operator and what it is in, the innermost decides
_PARTS = {
    "fbgemm::split_embedding_backward": "FBGEMM backward",
    "torch::autograd::CppNode<SplitLookupFunction": "FBGEMM backward",
    "fbgemm::split_embedding": "FBGEMM forward",
    _SETTLE: "settle, besides its operators",
    "autograd::engine::evaluate_function: torch::autograd::CppNode<SplitLookupFunction": (
        "hook on the pooled gradient, besides its operators"
    ),
    "[lookup]": "lookup, besides all these",
    "[output_dist]": "output dist",
    "[splits_dist]": "input dist",
    "## start_sparse_data_dist": "input dist",
    "## wait_sparse_data_dist": "input dist",
    "## runtime_forward_assemble_KJT": "input dist",
    "## all2all_data": "input dist",
    "## optimizer": "optimizer",
    "## zero_grad": "optimizer",
    "Optimizer.": "optimizer",
    "c10d::": "allreduce",
    "torch::distributed::": "allreduce",
    "autograd::": _DENSE,
    "aten::": _DENSE,
}
# Of process groups' own threads, which run beside the step.
_ELSEWHERE = ("gloo:", "nccl:")


@contextmanager
def _settle_labelled() -> Iterator[None]:
    """Let the profiler see which operators run inside ``CompressedBags.settle``."""
    settle = CompressedBags.settle

    def labelled(self: CompressedBags) -> None:
        with record_function(_SETTLE):
            settle(self)

    CompressedBags.settle = labelled
    try:
        yield
    finally:
        CompressedBags.settle = settle


def _part_of(names: list[str]) -> str:
    """The part that an operator belongs to, by its name and those that it is in, inside out."""
    dense = ""
    for name in names:
        if name.startswith(_OPERATOR):
            return name
        part = next((part for start, part in _PARTS.items() if name.startswith(start)), "")
        if part == _DENSE:
            dense = part  # unless it is in one of the other parts
        elif part:
            return part
    return dense or _REST


def _profile(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    # Kineto prints two lines of its own for every profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    parts: defaultdict[str, float] = defaultdict(float)
    for event in recorded.events() or []:
        names, parent = [], event
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        if not names[-1].startswith(_ELSEWHERE):
            parts[_part_of(names)] += event.self_cpu_time_total / 1e3 / steps
    return parts


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
    with _settle_labelled():
        for number in tqdm(range(rounds), desc="parts", unit="round", leave=False):
            for kind in list(steps)[:: 1 if number % 2 else -1]:
                turns[kind].append(_profile(steps[kind], steps_per_turn))
    parts = {
        part: {
            kind: statistics.median(turn.get(part, 0.0) for turn in of_kind)
            for kind, of_kind in turns.items()
        }
        for part in {part for of_kind in turns.values() for turn in of_kind for part in turn}
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
