"""Where a training step's time goes, as torch.profiler sees it.

Every operator counts where it runs: an operator of ``torchrec_cafe`` for itself, FBGEMM's for its
forward or backward, all others for the innermost part of the step that they are in. Times are of
the host alone; on CUDA that is the time to launch. Waiting for other ranks counts where a rank
waits.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch.profiler import ProfilerActivity, profile

OPERATOR = "torchrec_cafe::"
_DENSE = "dense layers"
_REST = "everything else"
_BACKWARD = "FBGEMM backward"
_FORWARD = "FBGEMM forward"
_HOOK = "hook on the pooled gradient, besides its operators"
_SETTLE = "settle, besides its operators"
_LOOKUP = "lookup, besides all these"
#: parts by how the profiler's names begin; of an operator and what it is in, the innermost decides
_PARTS = {
    "fbgemm::split_embedding_backward": _BACKWARD,
    "torch::autograd::CppNode<SplitLookupFunction": _BACKWARD,
    "fbgemm::split_embedding": _FORWARD,
    "CompressedBags.settle": _SETTLE,
    "autograd::engine::evaluate_function: torch::autograd::CppNode<SplitLookupFunction": _HOOK,
    "[lookup]": _LOOKUP,
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

_IDS, _SKETCH, _UPDATE = "ids to rows", "sketch and hot rows", "embedding backward and optimizer"
#: what the parts are for, in the order of a step
PURPOSES: tuple[str, ...] = (
    "input dist",
    _IDS,
    "embedding forward",
    "output dist",
    "dense forward and backward",
    _UPDATE,
    _SKETCH,
    "dense optimizer and allreduce",
    "rest",
)
_PURPOSE = {
    "input dist": "input dist",
    _LOOKUP: _IDS,
    _FORWARD: "embedding forward",
    "output dist": "output dist",
    _DENSE: "dense forward and backward",
    _BACKWARD: _UPDATE,
    _HOOK: _SKETCH,
    _SETTLE: _SKETCH,
    "optimizer": "dense optimizer and allreduce",
    "allreduce": "dense optimizer and allreduce",
    _REST: "rest",
}
_PURPOSE |= {
    OPERATOR + name: purpose
    for purpose, names in {
        _SKETCH: ("observe", "rebalance", "learn", "learn_scaled", "move_rows"),
        _UPDATE: ("factor_gradients", "bloom_weigh_backward"),
        "embedding forward": ("key_factors", "bloom_weigh", "bloom_pool"),
    }.items()
    for name in names
}


def _part_of(names: list[str]) -> str:
    """The part that an operator belongs to, by its name and those that it is in, inside out."""
    dense = ""
    for name in names:
        if name.startswith(OPERATOR):
            return name
        part = next((part for start, part in _PARTS.items() if name.startswith(start)), "")
        if part == _DENSE:
            dense = part  # unless it is in one of the other parts
        elif part:
            return part
    return dense or _REST


def profile_parts(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step.

    Args:
        step: takes one.
        steps: how many to take, >= 1.
    """
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
    return dict(parts)


def median_parts(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians of each part.

    Args:
        turns: of :func:`profile_parts`; a part that a turn lacks took no time in it.
    """
    parts = dict.fromkeys(part for turn in turns for part in turn)
    return {part: statistics.median(turn.get(part, 0.0) for turn in turns) for part in parts}


def by_purpose(parts: Mapping[str, float]) -> dict[str, float]:
    """The same milliseconds by what they are for, of :data:`PURPOSES`, in the order of a step.

    Args:
        parts: of :func:`profile_parts`.
    """
    sums: dict[str, float] = dict.fromkeys(PURPOSES, 0.0)
    for part, value in parts.items():
        sums[_PURPOSE.get(part, _IDS if part.startswith(OPERATOR) else "rest")] += value
    return sums
