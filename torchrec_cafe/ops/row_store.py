"""Rows between memory, and between memory and files.

Shape legend: n rows that move, R rows of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_cafe.ops._checks import check_same_device, check_tensor, value_error


def copy_rows(into: Tensor, into_rows: Tensor, source: Tensor, rows: Tensor) -> None:
    """Copy rows of one tensor to rows of another.

    Args:
        into: ``[R, ...]`` of any dtype, contiguous, mutated.
        into_rows: int64 ``[n]``, where to, each once.
        source: ``[R', ...]``, contiguous, of the dtype and columns of ``into``.
        rows: int64 ``[n]``, which.

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or a row is out of range; nothing is mutated
            then.

    Note:
        Deterministic. On the CPU, on the calling thread. Not differentiable.
    """
    try:
        torch.ops.torchrec_cafe.copy_rows.default(into, into_rows, source, rows)
    except RuntimeError as error:
        _check_rows("copy_rows", into, into_rows, rows)
        check_tensor("copy_rows", "source", source, into.dtype, (None, *into.shape[1:]))
        raise value_error("copy_rows", error) from None


def read_rows(
    file: int, rows: Tensor, into: Tensor, into_rows: Tensor, *, num_threads: int
) -> None:
    """Read rows of a file that holds a tensor, and nothing else.

    Args:
        file: its descriptor.
        rows: int64 ``[n]``, which, >= 0.
        into: ``[R, ...]`` of any dtype, contiguous, mutated.
        into_rows: int64 ``[n]``, where to, each once.
        num_threads: threads that wait for the disk at the same time, in [1, 1024].

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or a row is out of range; nothing is mutated
            then.
        OSError: if the file cannot be read or is too short; some rows may have been read.

    Note:
        Deterministic. On the CPU. Not differentiable.
    """
    try:
        torch.ops.torchrec_cafe.read_rows.default(file, rows, into, into_rows, num_threads)
    except RuntimeError as error:
        _check_rows("read_rows", into, into_rows, rows)
        raise _file_error("read_rows", error) from None


def write_rows(
    file: int, rows: Tensor, source: Tensor, source_rows: Tensor, *, num_threads: int
) -> None:
    """Write rows of a file that holds a tensor, and nothing else.

    Args:
        file: its descriptor.
        rows: int64 ``[n]``, which, >= 0, each once.
        source: ``[R, ...]`` of any dtype, contiguous.
        source_rows: int64 ``[n]``, where from.
        num_threads: threads that wait for the disk at the same time, in [1, 1024].

    Raises:
        TypeError: if a dtype is not the one above.
        ValueError: if a shape is not the one above, or a row is out of range; nothing is written
            then.
        OSError: if the file cannot be written; some rows may have been written.

    Note:
        Deterministic. On the CPU. Not differentiable.
    """
    try:
        torch.ops.torchrec_cafe.write_rows.default(file, rows, source, source_rows, num_threads)
    except RuntimeError as error:
        _check_rows("write_rows", source, source_rows, rows)
        raise _file_error("write_rows", error) from None


def _file_error(op: str, error: RuntimeError) -> Exception:
    explained = value_error(op, error)
    is_io = "`file` could not" in str(explained)
    return OSError(str(explained)) if is_io else explained


def _check_rows(op: str, tensor: Tensor, at: Tensor, rows: Tensor) -> None:
    """Check what the operators take alike; of the names, those that differ are left vague."""
    check_tensor(op, "rows", rows, torch.int64, (None,))
    check_tensor(op, "rows in memory", at, torch.int64, (len(rows),))
    if tensor.dim() == 0 or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: the tensor in memory must be contiguous and have rows, got shape "
            f"{list(tensor.shape)}; call .contiguous() on it"
        )


@torch.library.register_fake("torchrec_cafe::copy_rows")
def _(into: Tensor, into_rows: Tensor, source: Tensor, rows: Tensor) -> None:
    check_same_device("copy_rows", into=into, into_rows=into_rows, source=source, rows=rows)


@torch.library.register_fake("torchrec_cafe::read_rows")
def _(file: int, rows: Tensor, into: Tensor, into_rows: Tensor, num_threads: int) -> None:
    check_same_device("read_rows", rows=rows, into=into, into_rows=into_rows)


@torch.library.register_fake("torchrec_cafe::write_rows")
def _(file: int, rows: Tensor, source: Tensor, source_rows: Tensor, num_threads: int) -> None:
    check_same_device("write_rows", rows=rows, source=source, source_rows=source_rows)
