"""What nvcc makes of the kernels, where it is at hand: it says what a GPU would be asked to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The code of each kernel of the sketch, by its mangled name."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    kernels: dict[str, str] = {}
    for source in ("remap", "hot_sketch"):
        path = tmp_path_factory.mktemp("ptx") / f"{source}.ptx"
        include = ["-I", str(ROOT / "csrc"), "-I", f"{torch.__path__[0]}/include"]
        options = ["-std=c++20", "-arch=sm_90", "--fmad=false", "-w", "-DUSE_CUDA"]
        options += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
        code = str(ROOT / "csrc/cuda" / f"{source}.cu")
        subprocess.run([nvcc, "-ptx", *options, *include, code, "-o", str(path)], check=True)
        entries = path.read_text().split(".entry ")[1:]
        kernels |= {entry[: entry.index("(")]: entry for entry in entries}
    return kernels


def accesses(ptx: dict[str, str], kernel: str, kind: str) -> list[str]:
    """Offsets of accesses of 16 bytes, of the only kernel of that name."""
    (code,) = [code for name, code in ptx.items() if kernel in name]
    wide = rf"{kind}\.global\.(?:v2\.[bu]64|v4\.[bu]32)[^\[]*\[(%rd\d+)(?:\+(\d+))?\]"
    places: dict[str, set[str]] = {}
    for register, offset in re.findall(wide, code):
        places.setdefault(register, set()).add(offset or "0")
    return sorted(max(places.values(), key=len), key=int)


def test_remap_reads_keys_and_rows_of_a_bucket_sixteen_bytes_at_a_time(ptx: dict[str, str]):
    assert accesses(ptx, "remap_kernel", "ld") == ["0", "16", "48"]  # it needs no scores


def test_learning_reads_and_writes_a_bucket_sixteen_bytes_at_a_time(ptx: dict[str, str]):
    assert accesses(ptx, "insert_kernel", "ld") == ["0", "16", "32", "48"]
    assert accesses(ptx, "insert_kernel", "st") == ["0", "16", "32", "48"]
