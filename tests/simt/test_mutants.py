"""The tests see what goes wrong in kernels: each of these mistakes is found, by the given message.

A mutant is a copy of the sources with one text replaced, compiled as the kernels are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.ops import test_cuda
from tests.simt import test_kernels
from tests.simt.build import CACHE, CSRC, ROOT, Kind, Library, sanitizer_environment
from tests.simt.device import SCHEDULES, Simt

Case = Callable[[Simt], None]


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what it is.
        file: the source in ``csrc`` that has it.
        text: what stands there, once.
        wrong: what the mutant has instead.
        case: the test that finds it.
        found: a regular expression of what the test says.
        kernels: files of ``csrc/cuda`` to compile; operators of others are the CPU's.
        kind: the build that tells.
    """

    name: str
    file: str
    text: str
    wrong: str
    case: Case
    found: str
    kernels: tuple[str, ...]
    kind: Kind = "races"

    def sources(self, folder: Path) -> Path:
        """The sources with the mistake, under ``folder``."""
        csrc = folder / "csrc"
        shutil.rmtree(csrc, ignore_errors=True)
        shutil.copytree(CSRC, csrc)
        path = csrc / self.file
        before = path.read_text()
        assert before.count(self.text) == 1, f"{self.file} has changed: {self.text}"
        path.write_text(before.replace(self.text, self.wrong))
        return csrc


def mixing(device: Simt) -> None:
    test_cuda.test_mixing_is_the_same_on_both(device, 1)


def sketch(device: Simt) -> None:
    test_cuda.test_a_sketch_of_one_bucket_is_the_same_on_both(device)


def bloom_rows(device: Simt) -> None:
    run = test_kernels.WAITING["bloom_rows"]
    for expected, got in zip(run(), device.run(run), strict=True):
        assert torch.equal(expected, got)


def capture(device: Simt) -> None:
    test_kernels.test_a_step_can_be_captured_into_a_graph(device, "bloom_rows of one hash")


MUTANTS = [
    Mutant(
        "add without an atomic operation",
        "cuda/mix_ids.cu",
        "atomicAdd(out_of_range + low, 1ULL);",
        "out_of_range[low] += 1;",
        mixing,
        "data race",
        ("mix_ids",),
    ),
    Mutant(
        "no bounds check at the end of the grid",
        "cuda/mix_ids.cu",
        "i < num_ids; i += index_stride()",
        "i < num_ids + 1; i += index_stride()",
        mixing,
        "heap-buffer-overflow",
        ("mix_ids",),
        "memory",
    ),
    Mutant(
        "a loop that leaves out what the first blocks do not reach",
        "cuda/mix_ids.cu",
        "i < num_ids; i += index_stride()",
        "i < num_ids; i = num_ids",
        mixing,
        "",
        ("mix_ids",),
    ),
    Mutant(
        "shuffles taken for a barrier",
        "cuda/hot_sketch.cu",
        "  __syncwarp();  // shuffles",
        "  // shuffles",
        sketch,
        "data race",
        ("hot_sketch",),
    ),
    Mutant(
        "a mask without the upper lanes",
        "cuda/hot_sketch.cu",
        "unsigned left = __ballot_sync(kWholeWarp, begins);",
        "unsigned left = __ballot_sync(0x0000ffffu, begins);",
        sketch,
        "wrong mask",
        ("hot_sketch",),
    ),
    Mutant(
        "lanes that end before a shuffle of the whole warp",
        "cuda/hot_sketch.cu",
        "    const int64_t key = mine ? seen.keys[i] : 0;\n",
        "    if (!mine) return;\n    const int64_t key = seen.keys[i];\n",
        sketch,
        "which does not take part|lanes of a warp meet|deadlock",
        ("hot_sketch",),
    ),
    Mutant(
        "a barrier too few between writing and reading",
        "cuda/rebalance.cu",
        "  if (amount != 0) atomicAdd(&scratch.total, static_cast<unsigned long long>(amount));\n"
        "  __syncthreads();\n",
        "  if (amount != 0) atomicAdd(&scratch.total, static_cast<unsigned long long>(amount));\n",
        sketch,
        "data race",
        ("rebalance",),
    ),
    Mutant(
        "a barrier in a branch",
        "cuda/rebalance.cu",
        "scratch.by_warp[warp] = __popc(votes);\n  __syncthreads();\n",
        "scratch.by_warp[warp] = __popc(votes);\n  if (lane == 0) __syncthreads();\n",
        sketch,
        "divergent barrier|uninitialised shared memory",
        ("rebalance",),
    ),
    Mutant(
        "a thread that ends before a barrier",
        "cuda/rebalance.cu",
        "  const Shard shard = state.shard(s);\n",
        "  const Shard shard = state.shard(s);\n  if (threadIdx.x == 7) return;\n",
        sketch,
        "divergent barrier",
        ("rebalance",),
    ),
    Mutant(
        "shared memory that nobody has set to zero",
        "cuda/rebalance.cu",
        "      scratch.histogram[digit] = 0;\n",
        "      if (digit < RadixSelect::kDigits - 1) scratch.histogram[digit] = 0;\n",
        sketch,
        "uninitialised shared memory",
        ("rebalance",),
    ),
    Mutant(
        "an index beyond shared memory",
        "cuda/rebalance.cu",
        "  int32_t by_warp[kWarps];",
        "  int32_t by_warp[kWarps - 1];",
        sketch,
        "out of bounds|overflow",
        ("rebalance",),
        "memory",
    ),
    Mutant(
        "a number that the host reads too early",
        "cuda/scan.cuh",
        "  STD_CUDA_CHECK(cudaStreamSynchronize(stream));\n",
        "",
        bloom_rows,
        "new_zeros",
        ("bloom",),
    ),
    Mutant(
        "a host that waits in a step",
        "cuda/bloom.cu",
        "num_hashes == 1 ? ids.numel() : last_value(out_offsets, stream)",
        "last_value(out_offsets, stream)",
        capture,
        "the host waits",
        ("bloom",),
    ),
    Mutant(
        "the default stream",
        "cuda/launch.cuh",
        "  config.stream = stream;\n",
        "  config.stream = stream == nullptr ? stream : nullptr;\n",
        mixing,
        "another than the current stream",
        ("mix_ids",),
    ),
    Mutant(
        "no device guard",
        "cuda/mix_ids.cu",
        "  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());\n",
        "",
        mixing,
        "without a device guard",
        ("mix_ids",),
    ),
]


def run(number: int) -> None:
    """Run a mutant under every schedule, until something goes wrong."""
    mutant = MUTANTS[number]
    namespace = f"torchrec_cafe_mutant_{number}"
    sources = mutant.sources(CACHE / "mutants" / str(number))
    device = Simt(Library(mutant.kind, namespace, sources, mutant.kernels))
    for schedule in SCHEDULES:
        device.set_schedule(schedule)
        mutant.case(device)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[mutant.name for mutant in MUTANTS])
def test_a_mistake_is_found(number):
    mutant = MUTANTS[number]
    if mutant.kind == "races":
        with pytest.raises((AssertionError, RuntimeError, ValueError), match=f"(?s){mutant.found}"):
            run(number)
        return
    # The sanitizer ends the process.
    call = f"from tests.simt.test_mutants import run; run({number})"
    done = subprocess.run(
        [sys.executable, "-c", call],
        env=sanitizer_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert re.search(mutant.found, done.stderr), done.stderr[-4000:]
