"""Rows that move between memory and files: operators against their definitions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_cafe import ops
from torchrec_cafe.ops import reference

DTYPES = [torch.float32, torch.float16, torch.int64]
SHAPES = st.sampled_from([(), (1,), (5,), (64,), (2, 3)])


def draw_rows(num_rows: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 99, (num_rows, *shape), generator=generator).to(dtype)


def some_of(num_rows: int, count: int, seed: int) -> Tensor:
    """Numbers of rows, each once."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:count]


@contextmanager
def opened(path: Path, rows: Tensor, flags: int = os.O_RDWR) -> Iterator[int]:
    """The descriptor of a file that holds rows."""
    path.write_bytes(rows.numpy().tobytes())
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40)),
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_copied_rows_match_reference(sizes, shape, dtype, seed):
    size, source_size, count = sizes
    into, source = draw_rows(size, shape, dtype, seed), draw_rows(source_size, shape, dtype, seed)
    into_rows = some_of(size, count, seed)
    rows = torch.randint(source_size, into_rows.shape)  # may repeat
    expected = into.clone()
    reference.copy_rows(expected, into_rows, source, rows)
    ops.copy_rows(into, into_rows, source, rows)
    assert torch.equal(into, expected)


def test_many_rows_are_copied_as_one_after_the_other():
    source = torch.randn(20_000, 64)
    into, into_rows, rows = torch.zeros(20_000, 64), torch.randperm(20_000), torch.arange(20_000)
    ops.copy_rows(into, into_rows, source, rows)
    assert torch.equal(into[into_rows], source)


@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60)),
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    num_threads=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_a_file_match_reference(folder, sizes, shape, dtype, num_threads, seed):
    file_size, size, count = sizes
    stored, memory = draw_rows(file_size, shape, dtype, seed), draw_rows(size, shape, dtype, seed)
    count = min(file_size, size, count)
    rows, memory_rows = some_of(file_size, count, seed), some_of(size, count, seed + 1)
    results = []
    for module in (ops, reference):
        into = memory.clone()
        with opened(folder / "rows", stored) as file:
            module.read_rows(file, rows, into, memory_rows, num_threads=num_threads)
            changed = into + 1
            # Behind the end too: the file grows.
            module.write_rows(file, rows + 7, changed, memory_rows, num_threads=num_threads)
        results.append((into, (folder / "rows").read_bytes()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    expected = memory.clone()
    expected[memory_rows] = stored[rows]
    assert torch.equal(results[0][0], expected)


def test_what_is_written_is_read_on_many_threads(tmp_path):
    rows, order = torch.randn(5000, 16), torch.randperm(5000)
    with opened(tmp_path / "rows", rows[:0]) as file:
        ops.write_rows(file, order, rows, torch.arange(5000), num_threads=16)
        read = torch.zeros(5000, 16)
        ops.read_rows(file, order, read, torch.arange(5000), num_threads=16)
    assert torch.equal(read, rows)


@pytest.mark.parametrize("module", [ops, reference])
def test_a_file_that_cannot_be_read_or_written_is_an_os_error(module, tmp_path):
    stored, into, rows = torch.randn(4, 8), torch.zeros(5, 8), torch.arange(5)
    with opened(tmp_path / "rows", stored) as file:
        with pytest.raises(OSError, match="too short|Input/output"):
            module.read_rows(file, rows, into, rows, num_threads=2)
        os.truncate(file, 3 * 32 + 31)  # row 3 lacks a byte
        with pytest.raises(OSError, match="too short|Input/output"):
            module.read_rows(file, torch.tensor([3]), into, rows[:1], num_threads=1)
    for call in (module.read_rows, module.write_rows):
        with pytest.raises(OSError, match="Bad file"):
            call(file, rows, into, rows, num_threads=2)  # it is closed
    with opened(tmp_path / "rows", stored, os.O_RDONLY) as file:
        with pytest.raises(OSError, match="Bad file"):
            module.write_rows(file, rows, into, rows, num_threads=2)
    assert (tmp_path / "rows").read_bytes() == stored.numpy().tobytes()


def test_an_os_error_says_why(tmp_path):
    into, rows = torch.zeros(2, 8), torch.arange(2)
    with opened(tmp_path / "rows", into[:1]) as file:
        with pytest.raises(OSError, match="read_rows: `file` could not be read: Input/output"):
            ops.read_rows(file, rows, into, rows, num_threads=1)
    with pytest.raises(OSError, match="read_rows: `file` could not be read: Bad file"):
        ops.read_rows(file, rows, into, rows, num_threads=1)
    with pytest.raises(OSError, match="write_rows: `file` could not be written: Bad file"):
        ops.write_rows(file, rows, into, rows, num_threads=1)


def test_copying_names_the_argument_and_changes_nothing():
    into, source = torch.zeros(4, 2), torch.ones(3, 2)
    two = torch.tensor([0, 1])
    for args, kind, message in (
        (
            (into, two, source, torch.tensor([0, 3])),
            ValueError,
            r"`rows` must be in \[0, 3\), got 3",
        ),
        ((into, two - 1, source, two), ValueError, r"`into_rows` must be in \[0, 4\), got -1"),
        ((into, two, source[:0], two), ValueError, r"`rows` must be in \[0, 0\), got 0"),
        ((into, two.int(), source, two), TypeError, "`rows in memory` must be torch.int64, got"),
        ((into, two, source, two.int()), TypeError, "`rows` must be torch.int64, got torch.int32"),
        ((into, two[:1], source, two), ValueError, r"must have shape \[2\], got \[1\]"),
        ((into, two, source.half(), two), TypeError, "`source` must be torch.float32, got"),
        (
            (into, two, torch.ones(3, 3), two),
            ValueError,
            r"must have shape \[any, 2\], got \[3, 3\]",
        ),
        ((into, two, torch.ones(2, 3).T, two), ValueError, "`source` must be contiguous"),
        ((into.T, two, source, two), ValueError, "must be contiguous and have rows"),
        ((torch.zeros(()), two, source, two), ValueError, "must be contiguous and have rows"),
    ):
        with pytest.raises(kind, match=f"copy_rows: .*{message}"):
            ops.copy_rows(*args)
        assert (into == 0).all()


@pytest.mark.parametrize("name", ["read_rows", "write_rows"])
def test_files_name_the_argument_and_nothing_changes(name, tmp_path):
    call = getattr(ops, name)
    memory, stored, two = torch.zeros(4, 2), torch.ones(3, 2), torch.tensor([0, 1])
    side = "into_rows" if name == "read_rows" else "source_rows"
    with opened(tmp_path / "rows", stored) as file:
        for args, kind, message in (
            ((-1, two, memory, two), ValueError, "`file` must be a file descriptor, got -1"),
            ((file, two - 1, memory, two), ValueError, r"`rows` must be in \[0, \d+\), got -1"),
            # Its place in the file does not fit into 64 bits.
            (
                (file, two + 2**61, memory, two),
                ValueError,
                r"`rows` must be in \[0, \d+\), got 2305",
            ),
            ((file, two, memory, two + 3), ValueError, rf"`{side}` must be in \[0, 4\), got 4"),
            ((file, two.int(), memory, two), TypeError, "`rows` must be torch.int64, got"),
            ((file, two, memory, two[:1]), ValueError, r"must have shape \[2\], got \[1\]"),
            ((file, two, memory.T, two), ValueError, "must be contiguous and have rows"),
        ):
            with pytest.raises(kind, match=f"{name}: .*{message}"):
                call(*args, num_threads=2)
        for num_threads in (0, 1025):
            with pytest.raises(ValueError, match=r"`num_threads` must be in \[1, 1024\], got"):
                call(file, two, memory, two, num_threads=num_threads)
    assert (memory == 0).all()
    assert (tmp_path / "rows").read_bytes() == stored.numpy().tobytes()


def test_opcheck(tmp_path):
    operators = torch.ops.torchrec_cafe
    into, source, two = torch.zeros(4, 2), torch.ones(3, 2), torch.tensor([0, 1])
    torch.library.opcheck(operators.copy_rows, (into, two, source, two))
    with opened(tmp_path / "rows", source) as file:
        torch.library.opcheck(operators.read_rows, (file, two, into, two, 1))
        torch.library.opcheck(operators.write_rows, (file, two, into, two, 1))
