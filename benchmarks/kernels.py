"""How near the operators come to what the memory gives: bytes they must move, over time.

``python -m benchmarks.kernels --device cuda`` times each operator of a training step on batches of
26 features, one id a bag and twenty, beside ``torch.clone`` of a large tensor in the same run.
Bytes are those that no implementation can do without: each id, row and bucket once. On CUDA a call
is a captured graph of all input sets, so that the host's time does not count, and an operator that
waits for the device fails.

First each is held against its definition in :mod:`torchrec_cafe.ops.reference`, on small batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import Row, print_rows, write_json
from benchmarks.kernels_inputs import FULL, QUICK, SMALL, Call, Inputs, Sizes, calls
from torchrec_cafe import ops
from torchrec_cafe.ops import reference

#: least share of the copy's bandwidth, of the operators on the sketch, with many ids
TARGET = 0.7
ON_SKETCH = ("remap", "observe", "learn", "rebalance")
#: a turn takes all input sets once
INPUT_SETS = 4


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for part in result:
            yield from _tensors(part)


def _outcome(call: Call, module: ModuleType) -> list[Tensor]:
    """What a call gives, and what it changes."""
    given = list(_tensors(call.run(module)))
    return [tensor.cpu() for tensor in (*given, *call.changed)]


def check(device: torch.device) -> None:
    """Every operator does what its definition says.

    Args:
        device: where the operators run.

    Raises:
        AssertionError: naming the operator.
    """
    for name in calls(Inputs(SMALL, 0, torch.device("cpu"))):
        # Each on inputs of its own: some change them.
        expected = calls(Inputs(SMALL, 0, torch.device("cpu")))[name]
        ours = calls(Inputs(SMALL, 0, device))[name]
        for left, right in zip(_outcome(expected, reference), _outcome(ours, ops), strict=True):
            equal = torch.allclose(right.double(), left.double(), 1e-5, 1e-5, equal_nan=True)
            assert equal, f"{name} on {device.type} is not what its definition gives"


class Turns:
    """A call on several input sets, one after the other.

    Args:
        run: what to time.
        device: where it runs.
    """

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        """Warm up and, on CUDA, capture; see the class."""
        self._run, self._device = run, device
        run()
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        self._run = graph.replay
        self.seconds()

    def seconds(self) -> float:
        """Time of one turn."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            self._run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure(sizes: Sizes, device: torch.device, *, rounds: int) -> list[Row]:
    """The figures of one size of batches.

    Args:
        sizes: of batches and tables.
        device: where the operators run.
        rounds: in which all take turns.
    """
    sets = [calls(Inputs(sizes, seed, device)) for seed in range(INPUT_SETS)]
    source = torch.zeros(sizes.copied_bytes // 8, dtype=torch.int64, device=device)
    turns = {"copy": Turns(source.clone, device)}
    num_bytes = {"copy": 2.0 * sizes.copied_bytes}
    for name in sets[0]:
        of_name = [of[name] for of in sets]
        turns[name] = Turns(lambda of_name=of_name: [call.run(ops) for call in of_name], device)
        num_bytes[name] = sum(call.num_bytes for call in of_name)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in tqdm(range(rounds), desc=str(sizes), unit="round", leave=False):
        for name, turn in turns.items():
            seconds[name].append(turn.seconds())
    speed = {name: num_bytes[name] / statistics.median(of) for name, of in seconds.items()}
    rows = [Row(f"{sizes}/copy", speed["copy"] / 1e9, "GB/s")]
    for name in sets[0]:
        share = speed[name] / speed["copy"]
        target = TARGET if name in ON_SKETCH and device.type == "cuda" and sizes.is_large else None
        rows += [
            Row(f"{sizes}/{name}", 1e6 * statistics.median(seconds[name]) / INPUT_SETS, "us"),
            Row(f"{sizes}/{name} over copy", share, "x of bandwidth", 1.0, target),
        ]
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sketch, few rounds")
    parser.add_argument("--rounds", type=int, default=0, help="default: 50, quick: 3")
    parser.add_argument("--json", default="", help="where to write the figures")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU; --device cpu tries the code without one")
    device = torch.device(options.device)
    check(device)
    rows: list[Row] = []
    for sizes in QUICK if options.quick else FULL:
        rows += measure(sizes, device, rounds=options.rounds or (3 if options.quick else 50))
    print_rows(rows)
    write_json(options.json, "kernels", rows)


if __name__ == "__main__":
    main()
